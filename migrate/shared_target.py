"""Shared memory as it arrives, apart from CRIU's images: each segment in a memory file until it is mapped.

Where it can be, that memory file becomes the segment itself: CRIU gets it as an inherited descriptor, and nothing is
copied. All else CRIU makes empty, and its content is copied once, when everything is restored and nothing has run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from migrate.errors import ProtocolViolation
from migrate.fields import SharedPlace
from migrate.shared_source import MAX_SEGMENTS
from runtime.criu.page_protocol import PAGE_BYTES
from runtime.criu.segments import give_names, takeable
from runtime.errors import CriuFailed
from runtime.memory.maps import Kind, parse_mappings
from runtime.memory.store import Store
from runtime.memory.store_writer import StoreWriter
from transport.api import MAX_BODY_BYTES

COPY_BYTES = 16 << 20
Receive = Callable[[memoryview], None]
Charge = Callable[[int, Sequence[tuple[int, int]]], None]


class SharedTarget:
    """``spare``: empty memory files that the restoring CRIU has descriptors of as well. They are the caller's.

    ``charge`` is told what is about to be written to memory that will be the container's: the file's descriptor, and
    offsets and sizes (runtime/sandbox/charger.py).
    """

    def __init__(self, spare: Sequence[int], charge: Charge = lambda _fd, _spans: None) -> None:
        self._spare = list(spare)
        self._charge = charge
        self._stores: dict[int, Store] = {}
        self._spare_of: dict[int, int] = {}
        self._taken: set[int] = set()
        self.place_ms = 0.0
        """What ``finish`` took."""
        self._writer = StoreWriter()

    def receive(
        self, number: int, runs: Sequence[tuple[int, int]], zeros: Sequence[tuple[int, int]], receive: Receive
    ) -> None:
        """(offset, pages) with content, and those that are zeros now."""
        spans, holes = ([(offset, pages * PAGE_BYTES) for offset, pages in part] for part in (runs, zeros))
        if sum(size for _offset, size in spans) > MAX_BODY_BYTES:
            raise ProtocolViolation("more shared memory was announced at once than one frame holds")
        if spans or holes:
            store = self._store(number)
            if number in self._spare_of and spans:
                self._charge(store.fileno(), spans)
            with self._writer.receiving(store, spans, holes) as view:
                if spans:
                    receive(view)

    def _store(self, number: int) -> Store:
        if number not in self._stores:
            if len(self._stores) >= MAX_SEGMENTS:
                raise ProtocolViolation("too many segments of shared memory")
            self._stores[number] = Store(f"shared {number}", fd=self._take_spare(number))
        return self._stores[number]

    def _take_spare(self, number: int) -> int | None:
        index = len(self._spare_of)
        if index == len(self._spare):
            return None
        self._spare_of[number] = index
        return os.dup(self._spare[index])

    def give_to_criu(self, images: Path, places: Sequence[SharedPlace]) -> dict[str, int]:
        """Prepare what CRIU can take as it is: keys of inherited descriptors and the index of the spare file that each
        stands for. What comes later may still be received. Raises CorruptData."""
        possible = takeable(images)
        wanted = {place.id: place.size_bytes for place in places}
        fit = {
            number: index
            for number, index in self._spare_of.items()
            if number in possible
            and possible[number].size_bytes == wanted.get(number)
            # Pages are written whole: they would make a file longer that ends within one.
            and possible[number].size_bytes % PAGE_BYTES == 0
        }
        if not fit:
            return {}
        for number in fit:
            possible[number].prepare(self._stores[number].fileno())
        self._taken = set(fit)
        keys = give_names(images, {number: f"cmigrate-shared-{number}" for number in fit})
        return {keys[number]: index for number, index in fit.items()}

    def finish(self, places: Sequence[SharedPlace], tasks: Mapping[int, int]) -> None:
        """All has come and all is restored: ``tasks`` has pids here by those inside. Raises CriuFailed and NoRoom."""
        begin = time.monotonic()
        self._writer.finish()
        for place in places:
            if place.pid not in tasks:
                raise CriuFailed(f"process {place.pid} of the container was not restored")
            store = self._store(place.id)
            segment = _open_at(tasks[place.pid], place.address)
            try:
                same = os.path.sameopenfile(segment, store.fileno())
                if place.id in self._taken and not same:
                    raise CriuFailed(
                        "CRIU did not take the shared memory that it was given", hint="is it CRIU 4.0 or later?"
                    )
                if not same:
                    self._copy(store, segment, place.size_bytes)
            finally:
                os.close(segment)
        self.close()
        self.place_ms = (time.monotonic() - begin) * 1000

    def _copy(self, store: Store, segment: int, size_bytes: int) -> None:
        for offset, size in store.runs(0, size_bytes):
            end = min(offset + size, size_bytes)
            self._charge(segment, [(offset, end - offset)])
            os.lseek(segment, offset, os.SEEK_SET)
            while offset < end:
                offset += os.sendfile(segment, store.fileno(), offset, min(COPY_BYTES, end - offset))

    def facts(self) -> dict[str, int]:
        """For the journal: how many segments CRIU took as they were."""
        return {"shared_taken": len(self._taken)}

    def close(self) -> None:
        self._writer.close()
        while self._stores:
            self._stores.popitem()[1].close()


def _open_at(pid: int, address: int) -> int:
    """What is mapped there, to write to it."""
    for mapping in parse_mappings(Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")):
        if mapping.start <= address < mapping.end and mapping.kind is Kind.SHARED_MEMORY:
            path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    raise CriuFailed(f"no shared memory was restored at {address:#x} of process {pid}")
