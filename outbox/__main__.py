"""`outbox` and `python -m outbox`."""

import sys

from outbox.runtime.process import PROCESSES, run, run_process


def main() -> None:
    """Runs one of the processes, or another command; a user's mistake is one sentence, not a traceback."""
    name, *arguments = sys.argv[1:] or [""]
    if name in PROCESSES and not {"-h", "--help"} & set(arguments):
        run_process(name, arguments)
        return
    # Not before: a process needs none of it in its memory.
    from outbox.cli.commands import outbox  # noqa: PLC0415

    run(outbox.main)


if __name__ == "__main__":
    main()
