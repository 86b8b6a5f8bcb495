"""Entry point of `outbox` and `python -m outbox`."""

import sys

from outbox.runtime.process import PROCESSES, run, run_process


def main() -> None:
    """Runs one of the processes or another command. Reports a user's mistake in one sentence, without a traceback."""
    name, *arguments = sys.argv[1:] or [""]
    if name in PROCESSES and not {"-h", "--help"} & set(arguments):
        run_process(name, arguments)
        return
    # Imported here, to keep it out of the memory of a process.
    from outbox.cli.commands import outbox  # noqa: PLC0415

    run(outbox.main)


if __name__ == "__main__":
    main()
