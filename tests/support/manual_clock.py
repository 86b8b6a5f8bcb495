"""A clock for tests of code that measures time."""


class ManualClock:
    """A clock that stands still until the test advances it. Replaces `time.monotonic`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Returns the time in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Moves the time forward."""
        self.now += seconds
