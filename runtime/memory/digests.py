"""One digest over memory, the same on both sides of a move whatever was left out as zero."""

from __future__ import annotations

import struct

import xxhash

from runtime.criu.pages import nonzero_runs

PAGE_BYTES = 4096
_ADDRESS = struct.Struct("=Q")


class MemoryDigest:
    """Over (address, content) of every page that is not all zeros, in ascending order of address.

    A page of zeros counts as none: whether it exists is not what a program can see.
    """

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.pages = 0

    def add(self, address: int, content: bytes | bytearray | memoryview) -> None:
        """Whole pages that follow each other from ``address`` on."""
        view = memoryview(content).cast("B")
        for first, count in nonzero_runs(view):
            # A run of pages is split at any place, so each page stands for itself.
            for page in range(first, first + count):
                self._hash.update(_ADDRESS.pack(address + page * PAGE_BYTES))
                self._hash.update(view[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
            self.pages += count

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
