# Recipes run in .venv, or in the folder that VENV names. The first recipe that needs the folder creates it.

set shell := ["sh", "-euc"]

venv := env("VENV", ".venv")
bin := venv / "bin"

# The interpreter of that folder. Another interpreter needs another folder:
# `PYTHON=python3.13 VENV=.venv-3.13 just test`.
python := env("PYTHON", "python3")

# Tests start a hundred processes. Without stored bytecode, each one would compile all modules again.
export PYTHONDONTWRITEBYTECODE := ""

# List the recipes
default:
    @{{ just_executable() }} --list --unsorted

# Four processes, because tests mostly wait: more than a small machine has cores. The tests of a file stay together.
pytest := bin / "pytest --numprocesses=4 --dist=loadfile --no-loadscope-reorder"

# Run everything on this machine: API, relay, worker, and a server for each URL that is not set
[no-exit-message]
up *arguments: setup
    @{{ bin }}/outbox up {{ arguments }}

# Run all tests, or those selected by pytest's arguments
test *arguments: setup
    @{{ pytest }} {{ arguments }}

# Run all tests with a tracer in every process, and require 90 % branch coverage
coverage *arguments: setup
    @{{ pytest }} --cov --cov-report=term --cov-fail-under=90 {{ arguments }}

# Inject random faults while users are created, and check that nothing was lost (--help lists the options)
[no-exit-message]
chaos *arguments: setup
    @{{ bin }}/python -m tests.chaos {{ arguments }}

# Run the SQL statements in random order, and judge every transition of a row (--help lists the options)
[no-exit-message]
schedules *arguments: setup
    @{{ bin }}/python -m tests.schedules {{ arguments }}

# Measure how long mails wait after a fault, and compare with the promised times
[no-exit-message]
recovery *arguments: setup
    @{{ bin }}/python -m tests.chaos.recovery_times {{ arguments }}

# Measure speed compared with the alternatives; `just bench relay` measures one part (--help lists the options)
[no-exit-message]
bench *arguments: setup-bench
    @{{ bin }}/python -m bench {{ arguments }}

# Add 500 rows a second for half an hour, and show whether the table stops growing (--help lists the options)
[no-exit-message]
steady *arguments: setup-bench
    @{{ bin }}/python -m bench.steady {{ arguments }}

# Check the model of a row's life in docs/model; needs spin and gcc
[no-exit-message]
model:
    @docs/model/check.sh

# Check the pinned dependencies, formatting, lint, types and import rules
check: setup-bench
    {{ bin }}/python -m pip check
    {{ bin }}/ruff format --check .
    {{ bin }}/ruff check .
    {{ bin }}/mypy
    {{ bin }}/lint-imports

# Format the code, and fix what the linter can fix
fmt: setup
    {{ bin }}/ruff check --fix .
    {{ bin }}/ruff format .

# Migrate the database in DATABASE_URL to the newest schema
migrate: setup
    @{{ bin }}/outbox migrate

# Run Postgres alone, and print the DATABASE_URL to export
postgres: setup
    @{{ bin }}/python -m outbox.devstack.single_server postgres

# Run Redis alone, and print the REDIS_URL to export
redis: setup
    @{{ bin }}/python -m outbox.devstack.single_server redis

# Pin the newest versions that pyproject.toml allows, with hashes, for every platform
lock: setup
    {{ bin }}/uv pip compile -q pyproject.toml --extra dev --upgrade {{ lock_options }} -o requirements.lock
    {{ bin }}/uv pip compile -q pyproject.toml --upgrade --constraint requirements.lock {{ lock_options }} -o requirements-runtime.lock
    {{ bin }}/uv pip compile -q pyproject.toml --extra dev --extra bench --upgrade --constraint requirements.lock {{ lock_options }} -o requirements-bench.lock

lock_options := "--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header"

# Build the wheel into dist/
wheel: setup
    {{ bin }}/python -m hatchling build -t wheel

# Build the image outbox-service
image:
    docker build -t outbox-service .

# --no-deps: the locks are complete. If pip resolved dependencies, it would take the newest coverage for pytest-cov's
# coverage[toml], despite the pin in the lock, and fail because that version has no hash.

# Install the pinned dependencies of requirements.lock into that folder, unless it is up to date
setup:
    @if [ ! -x {{ bin }}/python ]; then {{ python }} -m venv {{ venv }}; fi
    @if [ -z "$(find {{ venv }}/.installed -newer requirements.lock -newer pyproject.toml 2>/dev/null)" ]; then \
        echo "Installing the pinned dependencies into {{ venv }} …"; \
        {{ bin }}/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements.lock; \
        {{ bin }}/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .; \
        touch {{ venv }}/.installed; \
    fi

# Also install the alternatives that the bench measures
setup-bench: setup
    @if [ -z "$(find {{ venv }}/.bench-installed -newer {{ venv }}/.installed -newer requirements-bench.lock 2>/dev/null)" ]; then \
        {{ bin }}/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements-bench.lock; \
        touch {{ venv }}/.bench-installed; \
    fi
