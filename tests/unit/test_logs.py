"""Log lines: their content, their limits, and output that is not read."""

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
    """Our events and a library's warnings are JSON lines of the same form; a library's info lines are left out."""
    done = _run(
        "import logging; logs.get().info('ours', row=1); logging.getLogger('rq.worker').info('chatter');"
        "logging.getLogger('rq.worker').warning('theirs')"
    )
    ours, theirs = map(json.loads, done.stdout.splitlines())
    assert (ours["event"], ours["row"], ours["process"], ours["level"]) == ("ours", 1, "test", "info")
    assert (theirs["event"], theirs["process"], theirs["level"]) == ("theirs", "test", "warning")


def test_warnings_are_counted() -> None:
    """Each carries the count of its kind in this process, and the last line has all counts."""
    done = _run(
        "log = logs.get(); log.warning('dropped job', job=1); log.warning('dropped job', job=2); log.error('bad');"
        "log.info('fine'); import logging; logging.getLogger('rq.worker').warning('theirs'); log.info('stopped')"
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("nth") for line in lines] == [1, 2, 1, None, 1, None]
    assert lines[-1]["warnings"] == {"dropped job": 2, "bad": 1, "theirs": 1}


def test_events_that_others_cause_cannot_flood_the_log() -> None:
    """100 lines a minute of each are logged; `nth` and the last line count all. Other events are not limited."""
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


def test_warnings_of_libraries_are_counted_by_format_string() -> None:
    """Their text may hold an address or a name, and the counts would grow without limit."""
    done = _run(
        "import logging; library = logging.getLogger('rq.worker');"
        "[library.warning('%r went wrong', object()) for _ in range(3)]; logs.get().info('stopped')"
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("nth") for line in lines] == [1, 2, 3, None]
    assert lines[-1]["warnings"] == {"%r went wrong": 3}


def test_warnings_of_psycopg_are_not_logged() -> None:
    """In an outage, each connection that breaks in a transaction would add a line to ours."""
    done = _run(
        "import logging; logging.getLogger('psycopg').warning('error ignored in rollback'); logs.get().info('ours')"
    )
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["ours"]


def test_a_traceback_shows_no_local_variable() -> None:
    """A local variable may hold a password. On the console and in JSON."""
    code = (
        "\ndef fail(password):\n    raise ValueError('no')\n"
        "try:\n    fail('open' + '-sesame')\nexcept ValueError:\n    logs.get().error('failed', exc_info=True)"
    )
    for log_format in ("console", "json"):
        done = _run(code, log_format)
        assert "ValueError: no" in done.stdout
        assert "open-sesame" not in done.stdout


def test_closed_output_loses_only_lines() -> None:
    """If the reader has closed standard output, log lines are lost and work goes on."""
    code = (
        "import os, sys; r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r);"
        "logs.get().info('lost'); logs.get().info('lost again');"
        "print('went on', end='', file=sys.stderr, flush=True); os._exit(0)"
    )
    done = _run(code)
    assert (done.stderr, done.returncode) == ("went on", 0)


def test_an_unencodable_character_loses_no_other_line() -> None:
    """Half of a surrogate pair in one of two lines that are written in one batch."""
    code = (
        "import threading; go = threading.Barrier(2);"
        "write = lambda text: (go.wait(), [logs.get().info(text, row=row) for row in range(200)]);"
        "threads = [threading.Thread(target=write, args=[text]) for text in ('fine', 'half \\ud800')];"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]"
    )
    lines = _run(code, "console").stdout.splitlines()
    assert sum("fine" in line for line in lines) == 200
    assert sum("half \\ud800" in line for line in lines) == 200


def test_a_line_with_a_huge_number_is_valid_json() -> None:
    """A payload may hold a number that overflows a float; a strict parser can still read the line."""
    code = (
        "payload = logs.payload_field('{\"n\": ' + '1' * 400 + '.5}');"
        "[logs.get().info(text, payload=payload) for text in ('plain', 'h\xe9')]"
    )
    for line in _run(code).stdout.splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["payload"] == {"n": "Infinity"}


def test_fields_bound_with_structlog_are_logged() -> None:
    """An application's handler may use structlog's binding or ours; a line's own fields win."""
    code = (
        "import structlog; structlog.contextvars.bind_contextvars(tenant=7)\n"
        "with logs.bound_fields(row=1, tenant=8): logs.get().info('x', row=2)\n"
        "logs.get().info('y')"
    )
    first, second = map(json.loads, _run(code).stdout.splitlines())
    assert (first["row"], first["tenant"], second["tenant"], "row" in second) == (2, 8, 7, False)


def test_unread_output_does_not_block() -> None:
    """If the pipe is full, threads go on, lines are dropped, and the process exits in time."""
    code = (
        "import os, sys, time; r, w = os.pipe(); os.dup2(w, 1); begun = time.monotonic()\n"
        "for row in range(20_000): logs.get().info('x' * 100, row=row)\n"
        "print('went on', time.monotonic() - begun < 10, end='', file=sys.stderr, flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", SET_UP.format("json") + code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stderr, done.returncode) == ("went on True", 0)


def test_lost_lines_are_counted() -> None:
    """Once the output is read again, the last line has the number of lost lines."""
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


def test_the_last_lines_are_written_before_the_exit() -> None:
    """However many there are."""
    code = "[logs.get().info('line', row=row) for row in range(5000)]"
    assert len(_run(code).stdout.splitlines()) == 5000


def test_a_forked_child_logs_and_ends() -> None:
    """It starts its own thread, and leaves unwritten lines of the parent to the parent."""
    code = (
        "import os; logs.get().info('parent'); child = os.fork()\n"
        "logs.get().info('forked', child=not child)\n"
        "if child: os.waitpid(child, 0)"
    )
    lines = [json.loads(line) for line in _run(code).stdout.splitlines()]
    assert [line["event"] for line in lines].count("parent") == 1
    assert sorted(line["child"] for line in lines if line["event"] == "forked") == [False, True]


def test_nonblocking_output_loses_no_line() -> None:
    """A parent may have set the pipe to non-blocking: lines that do not fit are written later."""
    code = "import os; os.set_blocking(1, False); [logs.get().info('x' * 100, row=row) for row in range(3000)]"
    assert len(_run(code).stdout.splitlines()) == 3000


def test_control_characters_are_escaped_on_a_terminal() -> None:
    """In every field, because paths, ids and task names may come from others; a traceback keeps its lines."""
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
    """A long field is cut to its beginning, wherever it comes from; the other fields are whole."""
    code = (
        f"value = {value}; logs.get().warning('ours', request_id=value, row=1, payload={{'a': [1, 2]}});"
        "logs.bind_fields(request_id=value); logs.get().warning('bound', row=1, payload={'a': [1, 2]});"
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
    """A handler may return thousands, with any names: then the line has only the known fields."""
    code = f"logs.get().info('processed task', **{{**{fields}, 'row': 7}})"
    (line,) = _run(code, log_format).stdout.splitlines()
    assert len(line) < 30_000
    assert "processed task" in line
    assert "7" in line


def test_a_traceback_and_a_payload_keep_their_own_limits() -> None:
    """In a line with a long field, the payload stays an object and the traceback has its last 10,000 characters."""
    code = (
        "\ndef fail(n): raise ValueError('x' * 20_000)\n"
        "try: fail(1)\n"
        "except ValueError as error:\n"
        '    payload = logs.payload_field(\'{"a": "\\u00e9"}\')\n'
        "    logs.get().error('failed', exc_info=error, request_id='y' * 5000, payload=payload)"
    )
    (line,) = map(json.loads, _run(code).stdout.splitlines())
    assert (len(line["exception"]), line["request_id"], line["payload"]) == (10_000, "y" * 2000, {"a": "\u00e9"})
