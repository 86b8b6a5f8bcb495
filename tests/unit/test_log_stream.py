"""The stream that `outbox up` merges the logs into."""

import io
import json
from pathlib import Path

import pytest

from outbox.devstack.log_stream import Stream

EVENT = {"event": "enqueued task", "row": 12, "type": "send", "level": "info", "timestamp": "2026-01-02T03:04:05.6Z"}


def _printed(line: str, *, as_json: bool = False) -> str:
    output = io.StringIO()
    Stream(output, as_json=as_json, on_broken=lambda: None).write_line("relay", line)
    return output.getvalue()


def test_an_event_becomes_a_readable_line() -> None:
    """The line has the time, the process, the event and its fields; without a terminal it has no colour."""
    time, process, event = _printed(json.dumps(EVENT)).split("  ", 2)
    assert len(time) == len("03:04:05")
    assert process == "relay"
    assert event.strip() == "enqueued task  row=12  type=send"


def test_other_lines_get_the_name_of_their_process() -> None:
    """A line of a traceback is written unchanged after the name of its process."""
    assert _printed('  File "x.py", line 3').rstrip().endswith('relay       File "x.py", line 3')


def test_json_output_keeps_events_and_wraps_other_lines() -> None:
    """Every line is JSON, and an event is as the process wrote it."""
    line = json.dumps(EVENT)
    assert _printed(line, as_json=True) == line + "\n"
    assert json.loads(_printed("Traceback", as_json=True))["event"] == "Traceback"


@pytest.mark.parametrize("control", ["\x1b[2J", "\x9b2J", "\r", "\u202e"])
def test_control_characters_are_escaped(control: str) -> None:
    """Control characters from a request do not reach the terminal."""
    assert control not in _printed(json.dumps(EVENT | {"path": f"/a{control}", "event": f"e{control}"}))
    assert control not in _printed(f"plain {control}")


def test_a_line_written_in_parts_is_one_line() -> None:
    """`print` writes the newline separately; the stream waits for it."""
    output = io.StringIO()
    writer = Stream(output, as_json=False, on_broken=lambda: None).writer("up")
    print("half", end="", file=writer)
    assert output.getvalue() == ""
    print(" and half", file=writer)
    assert output.getvalue().rstrip().endswith("half and half")


def test_a_broken_output_is_reported_and_not_raised(tmp_path: Path) -> None:
    """If the terminal or the reader of the pipe is gone, `on_broken` is called and the writing thread goes on."""
    output = (tmp_path / "closed").open("w")
    output.close()
    calls: list[bool] = []
    Stream(output, as_json=False, on_broken=lambda: calls.append(True)).write_line("relay", "x")
    assert calls == [True]
