#!/bin/sh
# Checks the model in outbox.pml: each property must hold, and each mutation must break its property.
# Exits with 0 if all results are as expected. "trace" prints how a property fails.
set -eu

usage='check.sh [trace PROPERTY [-DMACRO[=VALUE]]...]'

cd "$(dirname "$0")"
for tool in spin gcc; do
    if ! command -v "$tool" >/dev/null; then
        echo "docs/model/check.sh: $tool is not installed; on Debian: apt-get install spin gcc" >&2
        exit 2
    fi
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' HUP INT TERM
cp outbox.pml "$folder"
cd "$folder"
surprises=0

# search PROPERTY [-DMACRO]…: writes the checker's output to the file `report`, and a counterexample beside it.
# $how selects the search: `all` states, until the `first` counterexample, or for the `shortest` one.
search() {
    property=$1
    shift
    rm -f report pan ./*.trail
    case $how in
        all) compile=-O1 options='-w25 -a' ;;
        first) compile=-O0 options='-w20 -a' ;;
        shortest) compile='-O1 -DREACH -DSAFETY' options='-w20 -i' ;;
    esac
    if [ "$property" = eventually ]; then
        compile="${compile% -DREACH*} -DNFAIR=4" options="${options%-i} -a -f" # NFAIR: room for all processes
    else
        compile="$compile -DNOFAIR"
    fi
    # Memory in MB, depth in steps, time in minutes. A search that reaches a limit says so, and is_sound rejects it.
    # shellcheck disable=SC2086 # lists of options
    if ! { spin -a "$@" outbox.pml && gcc -w -DMEMLIM=1900 $compile -o pan pan.c; } >build.log 2>&1; then
        cat build.log >&2
        exit 2
    fi
    # shellcheck disable=SC2086 # a list of options
    ./pan -N "$property" -m100000 -Q10 $options >report 2>&1 || true
}

# Succeeds if the report is of a search for that property, and no limit cut the search short.
is_sound() {
    grep -q '^Full statespace search' report && grep -q "never claim.*+ ($property)" report || return 1
    [ "$property" != eventually ] || grep -q 'acceptance.*(fairness enabled)' report || return 1
    ! grep -qiE 'depth too small|out of memory|MEMLIM|time limit|pan: error' report
}

# line VERDICT [-DMACRO]…: prints one line about the search.
line() {
    verdict=$1
    shift
    awk -v verdict="$verdict" -v property="$property" -v macros="$*" '
        /states, stored/ { states = $1 }
        /^pan: elapsed time/ { seconds = $4 }
        END {
            gsub(/-D/, "", macros)
            printf "%-8s %-10s %9d states %5.1f s   %s\n", verdict, property, states, seconds, macros
        }' report
}

surprise() {
    line SURPRISE "$@"
    sed 's/^/    /' report
    surprises=$((surprises + 1))
}

# holds PROPERTY [-DMACRO]…: the property must hold, and the search must have been complete.
holds() {
    how=all
    search "$@"
    shift
    if is_sound && grep -q 'errors: 0$' report && ! grep -q 'Search not completed' report; then
        line holds "$@"
    else
        surprise "$@"
    fi
}

# breaks PROPERTY -DMACRO…: this property must fail, with a counterexample of its kind.
breaks() {
    how=first
    search "$@"
    shift
    case $property in
        eventually) failure='^pan:1: acceptance cycle' ;;
        *) failure='^pan:1: assertion violated' ;;
    esac
    if is_sound && grep -q 'errors: 1$' report && grep -q "$failure" report; then
        line breaks "$@"
    else
        surprise "$@"
    fi
}

if [ "${1-}" = trace ] && [ $# -ge 2 ]; then
    shift
    how=shortest
    search "$@"
    if ! is_sound || ! grep -q 'errors: [1-9]' report; then
        echo "no counterexample; the checker says:" >&2
        cat report >&2
        exit 1
    fi
    shift
    # One line per step: its number, its actor, and what it sets. `spin -t -p -g` prints more.
    spin -t -p "$@" outbox.pml | awk '
        /^ *[0-9]+:.*\(state .*\[.*\]$/ {
            what = $0
            sub(/^[^[]*\[/, "", what)
            sub(/\]$/, "", what)
            if (what ~ /^(\(|IF|\.|else|goto|break)/) next
            who = $4
            gsub(/[(:0-9)]/, "", who)
            if ($1 != step) printf "\n%-5s %-10s", $1, who " " $3
            step = $1
            printf " %s;", what
        }
        /START OF CYCLE|assertion violated/ { printf "\n%s", $0 }
        END { print "" }'
    exit 0
elif [ $# -gt 0 ]; then
    echo "usage: $usage" >&2
    exit 2
fi

echo 'The design: properties that must hold'
holds eventually -DFAULTS=0 -DNO_SWEEP -DNO_RESCUE # only faults need them
holds never_two -DFAULTS=0
holds eventually -DFAULTS=2
holds safe -DFAULTS=2
holds eventually -DFAULTS=1 -DREVIVALS=1
holds safe -DFAULTS=1 -DREVIVALS=1
holds safe -DCHAOS=3

echo 'Mutations: properties that must fail'
breaks eventually -DFAULTS=1 -DNO_SWEEP
breaks eventually -DFAULTS=1 -DNO_RESCUE
breaks eventually -DFAULTS=0 -DNO_SWEEP -DNO_RESCUE -DJUDGE_FIRST
breaks alone -DFAULTS=1 -DJUDGE_FIRST
breaks alone -DFAULTS=1 -DNO_FENCE
breaks alone -DFAULTS=0 -DHASTY_RESCUE
breaks alone -DFAULTS=1 -DGIVE_BACK_AT_ONCE
breaks alone -DFAULTS=2 -DIGNORE_TIME
breaks alone -DFAULTS=0 -DLET_GO_OVERDUE
breaks alone -DFAULTS=1 -DREVIVALS=1 -DRETRY_AT_ONCE
breaks never_two -DFAULTS=1
breaks final -DFAULTS=0 -DNO_RECHECK
breaks truthful -DFAULTS=1 -DMARK_FIRST
breaks bounded -DFAULTS=0 -DUNCOUNTED
breaks bounded -DFAULTS=0 -DHASTY_SWEEP
breaks bounded -DFAULTS=2 -DENDLESS_RESCUE
breaks ours -DCHAOS=1 -DTRUST_REDIS

if [ "$surprises" -gt 0 ]; then
    echo "$surprises checks had an unexpected result" >&2
    exit 1
fi
