"""Programs that judge a move by what their memory holds after it."""

import time
from collections.abc import Callable

from tests.support.services import PROGRAMS, Place

PATIENCE_S = 60.0


class Oracle:
    """A program that writes what is in its memory's pages, and knows it; see churn.py for the files it answers with."""

    options: tuple[str, ...] = ()
    workers = 2

    def __init__(self, name: str, program: str, *arguments: str) -> None:
        self.name = name
        self._program = program
        self._arguments = arguments
        self._asked = 0

    def command(self, client: object) -> tuple[str, ...]:
        program = (PROGRAMS / self._program).read_text()
        return ("python3", "-I", "-S", "-B", "-c", program, "/oracle", *self._arguments, str(self.workers))

    def open(self, place: Place) -> None:
        self._place = place
        self._until(lambda: "ready" in place.exec("ls", "/oracle").split())

    def check(self) -> None:
        """Every page of every process is looked at."""
        self._asked += 1
        word = f"w{self._asked}"
        self._place.exec("sh", "-c", f"echo {word} > /oracle/check.new; mv /oracle/check.new /oracle/check")
        self._until(lambda: self._read("checked").split().count(word) == self.workers)
        assert not self._read("wrong")

    def _read(self, name: str) -> str:
        return self._place.exec("sh", "-c", f"cat /oracle/{name} 2>/dev/null; cat /oracle/wrong 2>/dev/null; true")

    def _until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline, self._read("wrong") or "not in time"
            time.sleep(0.1)

    def close(self) -> None:
        pass


class Churn(Oracle):
    """Memory that changes in every way all the time, in two processes that know what it holds."""

    def __init__(self, mib: int) -> None:
        super().__init__("churn", "churn.py", str(mib))


class Sharing(Oracle):
    """Memory that three processes share, and memory that is forbidden, locked, huge or of many threads."""

    workers = 3

    def __init__(self) -> None:
        super().__init__("sharing", "sharing.py")


class Segments(Oracle):
    """Shared memory of every kind, also of those that a move must leave to CRIU, written to in every way."""

    def __init__(self) -> None:
        super().__init__("segments", "segments.py")
