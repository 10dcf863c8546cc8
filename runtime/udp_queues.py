"""What waits in a container's UDP sockets when it leaves: found, and copied while every task of it stands still.

CRIU dumps a UDP socket without its queue. What is in there came before the freeze and was not read yet, or came between
the freeze and the first frame that was held elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from runtime.api import NetworkSpec
from runtime.datagrams import MAX_BYTES, MAX_DATA_BYTES, MAX_DATAGRAMS, Datagram
from runtime.errors import KernelCallFailed
from runtime.linux.inet_diag import Address, InetSocket, without_mapping
from runtime.linux.processes import pidfd_getfd
from runtime.linux.udp_queue import UdpTable, peek
from runtime.network import in_network_namespace
from runtime.redelivery import own_addresses


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """``lost``: so many more can not be brought back. ``cut``: there are more than are carried, nobody knows how many.
    ``unseen``: this kernel does not tell."""

    datagrams: tuple[Datagram, ...] = ()
    lost: int = 0
    cut: bool = False
    unseen: bool = False

    def __str__(self) -> str:
        """What is lost, for the operator; empty when nothing is."""
        if self.unseen:
            return "this kernel has no udp_diag: what waits in UDP sockets is lost"
        if self.cut:
            limit = f"{MAX_DATAGRAMS} datagrams or {MAX_BYTES >> 20} MiB"
            return f"more than {limit} wait in the container's UDP sockets: the rest is lost"
        if self.lost:
            return f"{self.lost} datagrams that wait in the container's UDP sockets are lost"
        return ""


class UdpQueues:
    """Of one container. Made while it runs; ``read`` is quick when nothing waits. Raises OSError when it has ended."""

    def __init__(self, init_pid: int, pids: Callable[[], Iterable[int]], network: NetworkSpec | None) -> None:
        self._pids = pids
        self._own = own_addresses(network)
        self._table: UdpTable | None = in_network_namespace(init_pid, UdpTable)
        try:
            # The first question makes the kernel load its module, which takes its time.
            self._table.all()
        except KernelCallFailed:
            self.close()

    def read(self) -> Waiting:
        """Nothing is taken away. No task may run, and no frame may come."""
        if self._table is None:
            return Waiting(unseen=True)
        sockets = self._table.all()
        if not any(one.waiting for one in sockets):
            return Waiting()
        return waiting_in(self._pids(), sockets, self._own)

    def close(self) -> None:
        """Idempotent."""
        if self._table is not None:
            self._table.close()
            self._table = None


def waiting_in(
    pids: Iterable[int],
    sockets: Sequence[InetSocket],
    own: frozenset[Address],
    *,
    most: int = MAX_DATAGRAMS,
    most_bytes: int = MAX_BYTES,
) -> Waiting:
    """What these processes' sockets hold. ``sockets`` are all there are beside each other. Raises KernelCallFailed."""
    full = {one.inode: one for one in sockets if one.waiting and one.inode}
    listeners = Counter(one.local_port for one in sockets)
    carried: list[Datagram] = []
    lost = size_bytes = 0
    for inode, queue in copies(pids, full):
        with contextlib.closing(queue), contextlib.closing(_datagrams_in(queue, full[inode])) as found:
            for one in found:
                if not finds_its_way(one, full[inode], own, listeners):
                    lost += 1
                    continue
                size_bytes += len(one.data)
                if len(carried) >= most or size_bytes > most_bytes:
                    return Waiting(datagrams=tuple(carried), cut=True)
                carried.append(one)
    return Waiting(datagrams=tuple(carried), lost=lost)


def copies(pids: Iterable[int], wanted: Mapping[int, object]) -> Iterator[tuple[int, socket.socket]]:
    """Each wanted socket once, by its inode, as a descriptor of ours. Raises KernelCallFailed."""
    left = set(wanted)
    for pid in pids:
        for descriptor, inode in _sockets_of(pid) if left else ():
            if inode in left:
                left.remove(inode)
                yield inode, _copy(pid, descriptor)


def _sockets_of(pid: int) -> Iterator[tuple[int, int]]:
    """Descriptor and inode. A task that has ended has none: the kernel may end even a frozen one."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            link = os.readlink(f"/proc/{pid}/fd/{name}")
            if link.startswith("socket:["):
                yield int(name), int(link[8:-1])


def _copy(pid: int, descriptor: int) -> socket.socket:
    pidfd = os.pidfd_open(pid)
    try:
        return socket.socket(fileno=pidfd_getfd(pidfd, descriptor))
    finally:
        os.close(pidfd)


def _datagrams_in(queue: socket.socket, known: InetSocket) -> Generator[Datagram, None, None]:
    for source, source_port, destination, data in peek(queue):
        yield Datagram(
            source=source,
            source_port=source_port,
            destination=destination or without_mapping(known.local),
            port=known.local_port,
            data=data,
        )


def finds_its_way(one: Datagram, to: InetSocket, own: frozenset[Address], listeners: Mapping[int, int]) -> bool:
    """Whether sent again it comes to the same socket, and to no other. Pure."""
    if len(one.data) > MAX_DATA_BYTES or one.source.version != one.destination.version:
        return False
    if to.remote_port and (without_mapping(to.remote), to.remote_port) != (one.source, one.source_port):
        return False  # it came before the socket was connected, to somebody else
    to_one = one.destination in own or one.destination.is_loopback or one.destination.is_link_local
    # What was sent to a group or to all would come to each socket of that port once more.
    return (to_one and not one.destination.is_multicast) or listeners[to.local_port] == 1
