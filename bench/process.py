"""A process under measurement: ended with its block, and never dead unnoticed."""

from types import TracebackType
from typing import Self

from tests.support import processes


class Process(processes.Process):
    """One of the three processes. As a context manager it ends by SIGTERM, or is killed where the block failed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            self.kill()
            return
        died = self.popen.poll() is not None
        try:
            code = self.stop()
        finally:
            self.kill()
        if died or code != 0:
            raise RuntimeError(f"{self.module} ended with {code} while it was measured:\n{self.text()[-2000:]}")

    def check(self) -> None:
        """Checks that it still runs.

        Raises:
            RuntimeError: it does not; with its log's end.
        """
        if not self.is_up():
            raise RuntimeError(f"{self.module} ended with {self.popen.returncode}:\n{self.text()[-2000:]}")
