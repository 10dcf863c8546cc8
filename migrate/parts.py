"""What was sent while the container ran, so that after a broken link what did not arrive can be sent again.

A part is one bulk message with its data. Both sides count them, so the target's count of those that came whole says
which are missing: a tail, for a link keeps the order. Nobody acknowledges anything as long as the link is whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from migrate.errors import CanNotResume

# More than this can not be on its way: socket buffers, windows of SSH and what lies in between.
KEEP_BYTES = 512 << 20
KEEP_PARTS = 8192


@dataclass(frozen=True, kw_only=True)
class _Part:
    again: Callable[[], None]
    size_bytes: int


class Parts:
    """The last parts that went out, oldest first."""

    def __init__(self, keep_bytes: int = KEEP_BYTES, keep_parts: int = KEEP_PARTS) -> None:
        self._keep_bytes = keep_bytes
        self._keep_parts = keep_parts
        self._parts: deque[_Part] = deque()
        self._bytes = 0
        self.count = 0
        """Of all parts that went out."""
        self.total_bytes = 0

    def add(self, again: Callable[[], None], size_bytes: int) -> None:
        """One is about to go out; ``again`` sends it once more, as one part or as several, as it is then."""
        self._parts.append(_Part(again=again, size_bytes=size_bytes))
        self.count += 1
        self._bytes += size_bytes
        self.total_bytes += size_bytes
        # The rest must be enough by itself, and the last one is needed whatever its size.
        while len(self._parts) > 1 and (
            self._bytes - self._parts[0].size_bytes > self._keep_bytes or len(self._parts) > self._keep_parts
        ):
            self._bytes -= self._parts.popleft().size_bytes

    def rewind(self, taken: int) -> list[Callable[[], None]]:
        """The target has the first ``taken``: the rest, in order, to be sent again and counted anew.

        Raises CanNotResume when they are not known any more, or the number can not be.
        """
        lost = self.count - taken
        if not 0 <= lost <= len(self._parts):
            raise CanNotResume(f"{taken} of {self.count} parts came, and {len(self._parts)} are known")
        found = [self._parts.pop() for _ in range(lost)][::-1]
        gone_bytes = sum(part.size_bytes for part in found)
        self.count, self._bytes, self.total_bytes = taken, self._bytes - gone_bytes, self.total_bytes - gone_bytes
        return [part.again for part in found]
