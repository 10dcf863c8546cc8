"""Image pagemaps for a restore whose private memory comes from a pager, made from stores of received pages.

With ``lazy_pages`` CRIU registers every private anonymous mapping with a userfaultfd and hands that to the pager,
whatever the image pagemap says of it (seen with 4.2.1: one without any entry for such a mapping restores as well). So
only the rest has to be in the images: pages of private file mappings, locked memory, huge pages, what CRIU itself did
not call lazy (a thread's stack page), and shared memory. That is little, and all that is copied in the blackout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycriu.images import mm_pb2

from runtime.criu.images import MAX_BATCH_BYTES, PageImageWriter, _decode, _records, image_files
from runtime.criu.page_protocol import PAGE_BYTES, PE_PRESENT, SpaceId
from runtime.errors import CorruptData
from runtime.memory.ranges import PageRanges
from runtime.memory.store import MAX_ADDRESS, Store

_MM = 0x57492820
# asm-generic/mman-common.h and mman.h
_MAP_PRIVATE = 0x02
_MAP_ANONYMOUS = 0x20
_MAP_LOCKED = 0x2000
_MAP_HUGETLB = 0x40000
# criu/include/image.h: VMA_AREA_VSYSCALL, _VDSO, _VVAR, _SHSTK
_NEVER_LAZY = 1 << 2 | 1 << 3 | 1 << 12 | 1 << 15
_COPY_BYTES = 4 << 20

Span = tuple[int, int]
"""(start, end) in bytes."""


@dataclass(frozen=True, kw_only=True)
class LazySpace:
    """A task (by its pid in the images) and the memory of it that CRIU leaves to the pager, ascending."""

    vpid: int
    spans: tuple[Span, ...]


def read_lazy_spans(path: Path) -> tuple[list[Span], list[Span]]:
    """From a mm-*.img: the mappings that CRIU leaves to the pager, and those it does not. Raises CorruptData."""
    lazy: list[Span] = []
    eager: list[Span] = []
    for record in _records(path, _MM):
        for vma in _decode(mm_pb2.mm_entry, record, path).vmas:
            if vma.start % PAGE_BYTES or vma.end % PAGE_BYTES or not vma.start < vma.end:
                raise CorruptData(f"{path.name} has a mapping {vma.start:#x}-{vma.end:#x}")
            if vma.end > MAX_ADDRESS:
                continue  # the vsyscall page, which is the kernel's
            (lazy if can_be_lazy(vma.flags, vma.status) else eager).append((vma.start, vma.end))
    # Not joined: a copy of the pager's must lie within one mapping.
    return sorted(lazy), _joined(eager)


def can_be_lazy(flags: int, status: int) -> bool:
    """What criu/include/vma.h decides by: mmap's flags, and CRIU's own word on the mapping."""
    wanted = _MAP_PRIVATE | _MAP_ANONYMOUS
    return flags & wanted == wanted and not flags & (_MAP_LOCKED | _MAP_HUGETLB) and not status & _NEVER_LAZY


def _joined(spans: Iterable[Span]) -> list[Span]:
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def write_lazy_images(
    directory: Path,
    criu_version: tuple[int, int, int],
    stores: Mapping[SpaceId, Store],
    *,
    present: Mapping[SpaceId, PageRanges],
    eager: Mapping[SpaceId, Sequence[Span]] | None = None,
) -> tuple[LazySpace, ...]:
    """Complete an image set that has everything but pages: what is not lazy moves from the stores into image files.

    ``present`` are the pages that exist, of each store; one that is a hole there is all zeros. ``eager`` are more pages
    that must be there before the first instruction: runs that CRIU sent without PE_LAZY. The stores hold afterwards
    what the pager has to serve, and pages of no mapping. Raises CorruptData and NoRoom.
    """
    writer = PageImageWriter(directory, criu_version)
    lazy_spaces = []
    for path in image_files(directory, "mm-"):
        space = _task_of(path)
        lazy, rest = read_lazy_spans(path)
        lazy_spaces.append(LazySpace(vpid=space.id, spans=tuple(lazy)))
        writer.open(space)
        if space in stores:
            wanted = PageRanges.from_spans([*rest, *((eager or {}).get(space, ()))])
            _move(writer, space, stores[space], wanted & present[space])
    for space, store in stores.items():
        if space.kind == "shmem":
            writer.open(space)
            _move(writer, space, store, present[space])
    writer.finish()
    return tuple(lazy_spaces)


def _task_of(path: Path) -> SpaceId:
    number = path.name.removeprefix("mm-").removesuffix(".img")
    if not number.isdigit():
        raise CorruptData(f"{path.name} is of no task")
    return SpaceId("task", int(number))


def _move(writer: PageImageWriter, space: SpaceId, store: Store, pages: PageRanges) -> None:
    """In batches of runs, because a run can be a single page and a call of the writer opens the file."""
    for batch in _batches(piece for span in pages.spans() for piece in _pieces(span)):
        runs = [(address, size // PAGE_BYTES, PE_PRESENT) for address, size in batch]
        with writer.reserve(space, runs) as view:
            position = 0
            for address, size in batch:
                store.read_into(address, view[position : position + size])
                position += size
        store.punch(batch)


def _pieces(span: Span) -> Iterator[tuple[int, int]]:
    start, end = span
    for address in range(start, end, _COPY_BYTES):
        yield address, min(_COPY_BYTES, end - address)


def _batches(pieces: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    size = 0
    for piece in pieces:
        if batch and size + piece[1] > min(_COPY_BYTES, MAX_BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece[1]
    if batch:
        yield batch
