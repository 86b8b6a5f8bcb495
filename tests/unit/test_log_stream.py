"""The one stream that `outbox up` makes of many logs."""

import io
import json
from pathlib import Path

import pytest

from outbox.devstack.log_stream import Stream

EVENT = {"event": "enqueued task", "row": 12, "type": "send", "level": "info", "timestamp": "2026-01-02T03:04:05.6Z"}


def _printed(line: str, *, as_json: bool = False) -> str:
    output = io.StringIO()
    Stream(output, as_json=as_json, broken=lambda: None).line("relay", line)
    return output.getvalue()


def test_an_event_is_one_line_with_time_process_event_and_fields() -> None:
    """A JSON event becomes a line that a person reads; without a terminal there is no colour in it."""
    time, process, event = _printed(json.dumps(EVENT)).split("  ", 2)
    assert len(time) == len("03:04:05")
    assert process == "relay"
    assert event.strip() == "enqueued task  row=12  type=send"


def test_what_is_no_event_keeps_its_words_and_gets_a_name() -> None:
    """A traceback's line passes through with the process's name."""
    assert _printed('  File "x.py", line 3').rstrip().endswith('relay       File "x.py", line 3')


def test_json_passes_through_untouched_and_all_else_is_wrapped() -> None:
    """For a program that reads the stream every line is JSON, and ours are just as the process wrote them."""
    line = json.dumps(EVENT)
    assert _printed(line, as_json=True) == line + "\n"
    assert json.loads(_printed("Traceback", as_json=True))["event"] == "Traceback"


@pytest.mark.parametrize("stranger", ["\x1b[2J", "\x9b2J", "\r", "\u202e"])
def test_a_terminal_obeys_nothing_that_a_log_line_quotes(stranger: str) -> None:
    """Control characters that came in with a request are shown, not sent."""
    assert stranger not in _printed(json.dumps(EVENT | {"path": f"/a{stranger}", "event": f"e{stranger}"}))
    assert stranger not in _printed(f"plain {stranger}")


def test_a_line_written_in_pieces_is_one_line() -> None:
    """`print` writes its text and its newline apart; the stream waits for the whole line."""
    output = io.StringIO()
    writer = Stream(output, as_json=False, broken=lambda: None).writer("up")
    print("half", end="", file=writer)
    assert output.getvalue() == ""
    print(" and half", file=writer)
    assert output.getvalue().rstrip().endswith("half and half")


def test_an_output_that_is_gone_is_reported_and_not_raised(tmp_path: Path) -> None:
    """When the terminal or the pipe's reader is gone, whoever runs the stream is told, and no thread dies of it."""
    output = (tmp_path / "gone").open("w")
    output.close()
    told: list[bool] = []
    Stream(output, as_json=False, broken=lambda: told.append(True)).line("relay", "x")
    assert told == [True]
