"""Differences of directory trees: a container's upper layer and tmpfs mounts, carried once while it runs and then what
changed since. No transport: it makes and takes values.

On the source, for each tree, and again in the blackout with what the pass before left::

    sent = SentContent()
    first = scan(root, settle=True)
    for change in compare(None, first):
        ...  # change.to_message(), then where it has_content the pieces of read_chunks(root, change, sent=sent)
    second = scan(root, previous=first)
    for change in compare(first, second, sent=sent):
        ...  # the same

On a tmpfs times do not tell of stores through shared mappings: there ``always=second.file_inodes()``, and ``sent``
finds what differs. On the target a TreeSink (runtime/treesink.py) applies each change and writes its pieces, in order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgpack
import xxhash

from runtime.linux.procfs import parse_shared_writable
from runtime.tree_content import CHUNK_BYTES, SentContent, read_chunks
from runtime.tree_scan import scan
from runtime.tree_values import Change, Entry, Kind, Op, Snapshot

__all__ = [
    "CHUNK_BYTES",
    "Change",
    "Entry",
    "Kind",
    "Op",
    "SentContent",
    "Snapshot",
    "compare",
    "digest",
    "hash_files",
    "mapped_inodes",
    "read_chunks",
    "scan",
]

HASH_BLOCK_BYTES = 4096
_ZEROS = bytes(HASH_BLOCK_BYTES)


def compare(
    old: Snapshot | None,
    new: Snapshot,
    *,
    always: frozenset[int] = frozenset(),
    sent: SentContent | None = None,
) -> list[Change]:
    """The changes that lead from ``old`` (None: an empty directory) to ``new``, in an order that can be applied.

    A file counts as changed when size, times or inode differ, when ``old`` was taken too soon after a change for the
    times to tell, or when its inode is in ``always``. Where both snapshots have content hashes these decide instead.
    With ``sent`` a changed file that is still the same inode is patched, not replaced.
    """
    return _Comparison(old, new, always, sent).changes()


class _Comparison:
    def __init__(self, old: Snapshot | None, new: Snapshot, always: frozenset[int], sent: SentContent | None) -> None:
        self._old: dict[str, Entry] = old.entries if old is not None else {}
        self._new = new.entries
        self._groups = new.link_groups()
        self._always = always
        self._sent = sent

    def changes(self) -> list[Change]:
        # Children come before their directory: snapshots have parents first.
        found = [Change(op=Op.REMOVE, path=path) for path in reversed(self._old) if self._must_go(path)]
        made_anew: set[int] = set()
        for path, entry in self._new.items():
            names = self._groups[entry.inode] if entry.may_have_names else [path]
            # A file of several names is dealt with at its first; the others follow where their directories are there.
            if path == names[0]:
                changes = self._file_of_names(names, entry) if len(names) > 1 else self._entry(path, entry)
                made_anew.update(entry.inode for change in changes if change.op is Op.PUT)
                found += changes
            elif entry.inode in made_anew:
                found.append(Change(op=Op.LINK, path=path, target=names[0]))
        return found

    def _must_go(self, path: str) -> bool:
        """Gone, or something else now where one of both is a directory: other entries are replaced in one step."""
        now = self._new.get(path)
        return now is None or (now.kind != self._old[path].kind and Kind.DIRECTORY in (now.kind, self._old[path].kind))

    def _file_of_names(self, names: list[str], entry: Entry) -> list[Change]:
        before = [self._old.get(name) for name in names]
        if all(was is not None and was.may_have_names and was.inode == entry.inode for was in before):
            return self._entry(names[0], entry)
        return [_change(Op.PUT, names[0], entry)]

    def _entry(self, path: str, entry: Entry) -> list[Change]:
        was = self._old.get(path)
        if was is None or self._is_another(was, entry):
            return [_change(Op.PUT, path, entry)]
        if entry.kind is Kind.FILE and self._content_changed(was, entry):
            patch = self._sent is not None and self._sent.knows(entry.inode, path)
            return [_change(Op.PATCH if patch else Op.PUT, path, entry)]
        if was is entry or _attributes(was) == _attributes(entry):
            return []
        return [_change(Op.META, path, entry)]

    @staticmethod
    def _is_another(was: Entry, entry: Entry) -> bool:
        """Whether it has to be made anew. A directory stays what it is, and all whiteouts are the same."""
        if entry.kind in (Kind.DIRECTORY, Kind.WHITEOUT):
            return was.kind != entry.kind
        return (was.kind, was.inode, was.rdev, was.target) != (entry.kind, entry.inode, entry.rdev, entry.target)

    def _content_changed(self, was: Entry, entry: Entry) -> bool:
        if entry.inode in self._always:
            return True
        if was.content and entry.content:
            return was.content != entry.content
        if not was.settled:
            return True
        return (was.size, was.mtime_ns, was.ctime_ns) != (entry.size, entry.mtime_ns, entry.ctime_ns)


def _attributes(entry: Entry) -> tuple[object, ...]:
    return entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.xattrs


def _change(op: Op, path: str, entry: Entry) -> Change:
    return Change(
        op=op,
        path=path,
        kind=entry.kind,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        size=entry.size,
        mtime_ns=entry.mtime_ns,
        rdev=entry.rdev,
        target=entry.target,
        xattrs=entry.xattrs,
        inode=entry.inode,
    )


def hash_files(root: Path | int, snapshot: Snapshot) -> Snapshot:
    """The snapshot with the hash of each regular file's content, for ``compare`` and ``digest``.

    Not for a tree that is written to between hashing and sending: what is sent may be neither state. There ``always``
    and ``sent`` of ``compare`` are right, and read once.
    """
    entries = dict(snapshot.entries)
    for path, entry in entries.items():
        if entry.kind is Kind.FILE:
            hasher = xxhash.xxh3_128(entry.size.to_bytes(8, "little"))
            for offset, piece in read_chunks(root, _change(Op.PUT, path, entry)):
                # By blocks, and without those of zeros: where a file has holes is no part of its content.
                for start in range(0, len(piece), HASH_BLOCK_BYTES):
                    block = piece[start : start + HASH_BLOCK_BYTES]
                    if block != _ZEROS[: len(block)]:
                        hasher.update((offset + start).to_bytes(8, "little"))
                        hasher.update(block)
            entries[path] = dataclasses.replace(entry, content=hasher.digest())
    return Snapshot(entries=entries)


def mapped_inodes(pids: Iterable[int], snapshot: Snapshot) -> frozenset[int]:
    """Inodes of the snapshot's files that one of these processes can write to through memory."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for path in parse_shared_writable(Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")):
                entry = snapshot.entries.get(path.lstrip("/"))
                if entry is not None:
                    found.add(entry.inode)
    return frozenset(found)


def digest(tree: Snapshot | Path | int) -> bytes:
    """16 bytes that are the same for two trees alike in everything that travels, on whichever host.

    Content counts as far as the snapshot has hashes of it; of a Path or descriptor it does. Hard links count, inode
    numbers and change times do not.
    """
    snapshot = tree if isinstance(tree, Snapshot) else hash_files(tree, scan(tree))
    first_names = {inode: min(names) for inode, names in snapshot.link_groups().items() if len(names) > 1}
    hasher = hashlib.blake2b(digest_size=16)
    for path, entry in sorted((os.fsencode(path), entry) for path, entry in snapshot.entries.items()):
        change = _change(Op.PUT, os.fsdecode(path), entry)
        first = first_names.get(entry.inode, "") if entry.may_have_names else ""
        hasher.update(msgpack.packb([change.to_message(), os.fsencode(first), entry.content]))
    return hasher.digest()
