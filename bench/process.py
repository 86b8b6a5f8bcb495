"""Runs a process under measurement, and raises if it ends early."""

from types import TracebackType
from typing import Self

from tests.support import processes


class Process(processes.Process):
    """A service, relay or worker. As a context manager it is stopped by SIGTERM, or killed if the block raised."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            self.kill()
            return
        had_ended = self.popen.poll() is not None
        try:
            code = self.stop()
        finally:
            self.kill()
        if had_ended or code != 0:
            raise RuntimeError(f"{self.module} ended with {code} while it was measured:\n{self.text()[-2000:]}")

    def check(self) -> None:
        """Checks that the process is running.

        Raises:
            RuntimeError: it has ended. The message has the end of its log.
        """
        if not self.is_up():
            raise RuntimeError(f"{self.module} ended with {self.popen.returncode}:\n{self.text()[-2000:]}")
