"""Log lines: what they hold, what they never hold, and what happens when nobody takes them."""

import json
import subprocess
import sys
from collections import Counter

import pytest

SET_UP = "from outbox.runtime import logs; logs.configure('test', 'info', {!r}); "


def _run(code: str, log_format: str = "json") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SET_UP.format(log_format) + code], capture_output=True, text=True, check=False
    )


def test_libraries_log_as_we_do() -> None:
    """Our events and a library's warnings are JSON lines of one form; a library's chatter is left out."""
    done = _run(
        "import logging; logs.get().info('ours', row=1); logging.getLogger('rq.worker').info('chatter');"
        "logging.getLogger('rq.worker').warning('theirs')"
    )
    ours, theirs = map(json.loads, done.stdout.splitlines())
    assert (ours["event"], ours["row"], ours["process"], ours["level"]) == ("ours", 1, "test", "info")
    assert (theirs["event"], theirs["process"], theirs["level"]) == ("theirs", "test", "warning")


def test_warnings_are_counted() -> None:
    """Each says how many of its kind there have been in this process, and the last line names all."""
    done = _run(
        "log = logs.get(); log.warning('dropped job', job=1); log.warning('dropped job', job=2); log.error('bad');"
        "log.info('fine'); import logging; logging.getLogger('rq.worker').warning('theirs'); log.info('stopped')"
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("nth") for line in lines] == [1, 2, 1, None, 1, None]
    assert lines[-1]["warnings"] == {"dropped job": 2, "bad": 1, "theirs": 1}


def test_what_others_cause_by_the_thousand_floods_no_log() -> None:
    """A hundred lines a minute of each such event; `nth` and the last line count all. Other events are all logged."""
    done = _run(
        "from outbox.runtime import log_counts, logs; log = logs.get();"
        "[log.warning('dropped job', job=n) for n in range(5000)];"
        "[log.warning('ignored an RQ command') for _ in range(101)]; [log.warning('swept row') for _ in range(300)];"
        "log_counts.FLOOD_TIME = 0.0; log.warning('dropped job', job=5000); log.info('stopped')"
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    events = Counter(line["event"] for line in lines)
    assert events == {"dropped job": 101, "ignored an RQ command": 100, "swept row": 300, "stopped": 1}
    assert [line["nth"] for line in lines if line["event"] == "dropped job"] == [*range(1, 101), 5001]
    assert lines[-1]["warnings"]["dropped job"] == 5001


def test_warnings_of_libraries_are_counted_by_their_kind() -> None:
    """Not by their text, which may hold an address or a name: the counts would grow without end."""
    done = _run(
        "import logging; library = logging.getLogger('rq.worker');"
        "[library.warning('%r went wrong', object()) for _ in range(3)]; logs.get().info('stopped')"
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("nth") for line in lines] == [1, 2, 3, None]
    assert lines[-1]["warnings"] == {"%r went wrong": 3}


def test_what_psycopg_ignores_in_an_outage_is_not_logged() -> None:
    """Each connection that breaks in a transaction would be a line beside ours of the outage."""
    done = _run(
        "import logging; logging.getLogger('psycopg').warning('error ignored in rollback'); logs.get().info('ours')"
    )
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["ours"]


def test_a_traceback_shows_no_local_variable() -> None:
    """A password may be in one, on the console as well as in JSON."""
    code = (
        "\ndef fail(password):\n    raise ValueError('no')\n"
        "try:\n    fail('open' + '-sesame')\nexcept ValueError:\n    logs.get().error('failed', exc_info=True)"
    )
    for log_format in ("console", "json"):
        done = _run(code, log_format)
        assert "ValueError: no" in done.stdout
        assert "open-sesame" not in done.stdout


def test_work_goes_on_when_nobody_takes_the_lines() -> None:
    """With standard output closed at the other end, a log line is lost and nothing else."""
    code = (
        "import os, sys; r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r);"
        "logs.get().info('lost'); logs.get().info('lost again');"
        "print('went on', end='', file=sys.stderr, flush=True); os._exit(0)"
    )
    done = _run(code)
    assert (done.stderr, done.returncode) == ("went on", 0)


def test_what_no_terminal_can_show_takes_no_other_line_along() -> None:
    """Half of a surrogate pair, from a client's mistake, in one of two lines that are written at once."""
    code = (
        "import threading; go = threading.Barrier(2);"
        "write = lambda text: (go.wait(), [logs.get().info(text, row=row) for row in range(200)]);"
        "threads = [threading.Thread(target=write, args=[text]) for text in ('fine', 'half \\ud800')];"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]"
    )
    lines = _run(code, "console").stdout.splitlines()
    assert sum("fine" in line for line in lines) == 200
    assert sum("half \\ud800" in line for line in lines) == 200


def test_a_number_that_is_too_large_leaves_the_line_json() -> None:
    """A payload may hold one that no program can read; whoever reads logs strictly can read its line."""
    code = "[logs.get().info(text, payload=logs.stored('{\"n\": ' + '1' * 400 + '.5}')) for text in ('plain', 'h\xe9')]"
    for line in _run(code).stdout.splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["payload"] == {"n": "Infinity"}


def test_what_a_foreign_handler_binds_is_in_its_lines() -> None:
    """With structlog's own means, as with ours; a line's own fields win."""
    code = (
        "import structlog; structlog.contextvars.bind_contextvars(tenant=7)\n"
        "with logs.bound(row=1, tenant=8): logs.get().info('x', row=2)\n"
        "logs.get().info('y')"
    )
    first, second = map(json.loads, _run(code).stdout.splitlines())
    assert (first["row"], first["tenant"], second["tenant"], "row" in second) == (2, 8, 7, False)


def test_output_that_nobody_reads_blocks_nobody() -> None:
    """With the pipe full, threads go on; what does not fit is lost, and the process ends in time."""
    code = (
        "import os, sys, time; r, w = os.pipe(); os.dup2(w, 1); begun = time.monotonic()\n"
        "for row in range(20_000): logs.get().info('x' * 100, row=row)\n"
        "print('went on', time.monotonic() - begun < 10, end='', file=sys.stderr, flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", SET_UP.format("json") + code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stderr, done.returncode) == ("went on True", 0)


def test_lines_that_were_lost_are_counted() -> None:
    """Once somebody reads again, the last line says how many are missing."""
    code = (
        "import json, os, sys; r, w = os.pipe(); os.dup2(w, 1)\n"
        "for row in range(20_000): logs.get().info('x' * 100, row=row)\n"
        "logs.get().info('stopped'); text = b''\n"
        "while not text.endswith(b'}\\n') or b'stopped' not in text: text += os.read(r, 65536)\n"
        "lines = [json.loads(line) for line in text.splitlines()]\n"
        "print(len(lines), lines[-1]['lost_lines'], end='', file=sys.stderr, flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", SET_UP.format("json") + code], capture_output=True, text=True, check=False, timeout=60
    )
    written, lost = map(int, done.stderr.split())
    assert lost > 5000
    assert written + lost in (20_000, 20_001), "the last line may have taken the place of one more"


def test_the_last_lines_are_written_before_the_end() -> None:
    """However many there are, and whatever writes them."""
    code = "[logs.get().info('line', row=row) for row in range(5000)]"
    assert len(_run(code).stdout.splitlines()) == 5000


def test_a_forked_child_logs_and_ends() -> None:
    """It has no thread of its parent's; what the parent has not written yet is the parent's to write."""
    code = (
        "import os; logs.get().info('parent'); child = os.fork()\n"
        "logs.get().info('forked', child=not child)\n"
        "if child: os.waitpid(child, 0)"
    )
    lines = [json.loads(line) for line in _run(code).stdout.splitlines()]
    assert [line["event"] for line in lines].count("parent") == 1
    assert sorted(line["child"] for line in lines if line["event"] == "forked") == [False, True]


def test_output_that_does_not_block_loses_no_line() -> None:
    """A parent may have made the pipe so: what it does not take at once it takes later."""
    code = "import os; os.set_blocking(1, False); [logs.get().info('x' * 100, row=row) for row in range(3000)]"
    assert len(_run(code).stdout.splitlines()) == 3000


def test_a_terminal_obeys_nothing_that_is_logged() -> None:
    """Paths, ids and names of tasks are others' text, wherever in a line they are; a traceback keeps its lines."""
    hostile = "\\x1b[2J\\x07\\u202e\\nforged \\x9b"
    code = (
        f"text = '{hostile}'; logs.get().info(text, path=text, many=[text], by={{text: text}}, raw=text.encode());"
        "import logging; logging.getLogger('rq.worker').warning(text)\n"
        "try: raise ValueError(text)\n"
        "except ValueError as error: logs.get().error('failed', exc_info=error)\n"
    )
    shown = _run(code, "console").stdout
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(shown)
    assert len([line for line in shown.splitlines() if "forged" in line]) == 3
    assert "Traceback" in shown


LONG_FIELDS = {
    "text": "'x' * 200_000",
    "bytes": "b'x' * 200_000",
    "list": "list(range(50_000))",
    "nested": "{'a': {'b': ['x' * 200_000]}}",
    "object": "type('Long', (), {'__str__': lambda _: 'x' * 200_000, '__repr__': lambda _: 'x' * 200_000})()",
    "surrogates": "'\\ud800' * 200_000",
}


@pytest.mark.parametrize("log_format", ["console", "json"])
@pytest.mark.parametrize("value", LONG_FIELDS.values(), ids=LONG_FIELDS)
def test_no_field_makes_a_line_long(log_format: str, value: str) -> None:
    """Of a long one the beginning is logged, wherever it comes from; the other fields are whole."""
    code = (
        f"value = {value}; logs.get().warning('ours', request_id=value, row=1, payload={{'a': [1, 2]}});"
        "logs.bind(request_id=value); logs.get().warning('bound', row=1, payload={'a': [1, 2]});"
        "import logging; logging.getLogger('rq.worker').warning('theirs %s', value)"
    )
    lines = _run(code, log_format).stdout.splitlines()
    assert [name in line for name, line in zip(("ours", "bound", "theirs"), lines, strict=True)] == [True] * 3
    assert max(map(len, lines)) < 30_000
    if log_format == "json":
        ours, bound, theirs = map(json.loads, lines)
        assert len(ours["request_id"]) == len(bound["request_id"]) == len(theirs["event"]) == 2000
        assert (ours["row"], ours["payload"], bound["payload"]) == (1, {"a": [1, 2]}, {"a": [1, 2]})


@pytest.mark.parametrize("log_format", ["console", "json"])
@pytest.mark.parametrize(
    "fields", ["{f'field_{n}': 'x' * 2000 for n in range(1000)}", "{'x' * 200_000: 1}", "{'n': 10 ** 4000}"]
)
def test_no_number_of_fields_makes_a_line_long(log_format: str, fields: str) -> None:
    """A handler's may be thousands, with any names: then the line has those alone that say what it is about."""
    code = f"logs.get().info('processed task', **{{**{fields}, 'row': 7}})"
    (line,) = _run(code, log_format).stdout.splitlines()
    assert len(line) < 30_000
    assert "processed task" in line
    assert "7" in line


def test_a_traceback_and_a_payload_keep_their_own_limits() -> None:
    """Beside a long field the payload stays an object, and the traceback has its last 10,000 characters."""
    code = (
        "\ndef fail(n): raise ValueError('x' * 20_000)\n"
        "try: fail(1)\n"
        "except ValueError as error:\n"
        '    payload = logs.stored(\'{"a": "\\u00e9"}\')\n'
        "    logs.get().error('failed', exc_info=error, request_id='y' * 5000, payload=payload)"
    )
    (line,) = map(json.loads, _run(code).stdout.splitlines())
    assert (len(line["exception"]), line["request_id"], line["payload"]) == (10_000, "y" * 2000, {"a": "\u00e9"})
