"""The container's own files on the source, sent pass by pass: all of them first, then what changed since."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from migrate.outgoing import Outgoing
from runtime.tree import SentContent, Snapshot, compare, mapped_inodes, scan


class SourceTrees:
    """``roots`` are descriptors of the upper layer and of each tmpfs, in the order in which they are numbered; who
    opened them closes them. ``pids`` tells who may write to their files through memory."""

    def __init__(self, roots: Sequence[int], out: Outgoing, pids: Callable[[], Iterable[int]]) -> None:
        self._roots = roots
        self._out = out
        self._pids = pids
        self._snapshots: list[Snapshot | None] = [None] * len(roots)
        self._sent = [SentContent() for _root in roots]

    def send(self) -> None:
        """One pass over all of them. Raises as ``scan`` and ``Outgoing.tree``; then no further pass is possible."""
        for number in range(len(self._roots)):
            self._send_tree(number)

    def _send_tree(self, number: int) -> None:
        root, before, sent = self._roots[number], self._snapshots[number], self._sent[number]
        snapshot = scan(root, previous=before, settle=before is None)
        # Times do not tell of stores through shared mappings: on a tmpfs never, elsewhere not of every one.
        always = snapshot.file_inodes() if number else mapped_inodes(self._pids(), snapshot)
        self._out.tree(number, root, compare(before, snapshot, always=always, sent=sent), sent)
        self._snapshots[number] = snapshot
