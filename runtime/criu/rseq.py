"""Which bytes of a dumped process the kernel itself writes to: each thread's restartable sequences area (rseq(2)).

The kernel notes there on which processor the thread runs, so it is never the same after a move.
"""

from __future__ import annotations

from pathlib import Path

from pycriu.images import core_pb2, pstree_pb2

from runtime.criu.images import _PSTREE, _decode, _records

# criu/include/magic.h
_CORE = 0x55053847
Span = tuple[int, int]
"""(start, end) in bytes."""


def rseq_areas(images: Path) -> dict[int, list[Span]]:
    """By pid in the images. Raises CorruptData."""
    found: dict[int, list[Span]] = {}
    tree = images / "pstree.img"
    for record in _records(tree, _PSTREE):
        task = _decode(pstree_pb2.pstree_entry, record, tree)
        found[task.pid] = [span for thread in task.threads for span in _of_thread(images / f"core-{thread}.img")]
    return found


def _of_thread(core: Path) -> list[Span]:
    if not core.exists():
        return []  # of a task that has ended and is not waited for
    entries = (_decode(core_pb2.core_entry, record, core).thread_core.rseq_entry for record in _records(core, _CORE))
    return [
        (entry.rseq_abi_pointer, entry.rseq_abi_pointer + entry.rseq_abi_size)
        for entry in entries
        if entry.rseq_abi_pointer
    ]
