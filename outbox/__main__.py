"""`outbox` and `python -m outbox`."""

from outbox.commands import outbox
from outbox.start import run


def main() -> None:
    """Runs the `outbox` command; a user's mistake is one sentence, not a traceback."""
    run(outbox.main)


if __name__ == "__main__":
    main()
