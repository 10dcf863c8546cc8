"""The TCP connection of the SSH server that started this program: the server's, and found among its descriptors.

With the server's own settings the end of a connection whose cable was pulled is noticed after hours, and this program
would wait for a peer that is gone. The settings of a socket are the same for everybody who has it open.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Generator, Iterator
from pathlib import Path

from runtime.errors import KernelCallFailed
from runtime.linux.processes import pidfd_getfd

_MOST_ANCESTORS = 16
"""Between the server and this program there are a shell and perhaps a sudo."""


def ssh_socket() -> socket.socket | None:
    """A copy of the descriptor of it, for the caller to close; None where there is none, or it can not be had: without
    the right to look into other processes, or without the variable SSH_CONNECTION, which sudo takes away."""
    # CLIENT CPORT SERVER SPORT, of sshd(8); it writes UNKNOWN for what is no network's.
    words = os.environ.get("SSH_CONNECTION", "").split()
    try:
        client, client_port, server, server_port = words
        ends = _end(client, client_port), _end(server, server_port)
    except ValueError:
        return None
    for pid in _ancestors():
        # It may end, or be none of ours to look into.
        with contextlib.suppress(OSError, KernelCallFailed), contextlib.closing(_sockets_of(pid)) as sockets:
            for sock in sockets:
                if _ends_of(sock) == ends:
                    return sock
                sock.close()
    return None


def _ancestors() -> Iterator[int]:
    pid = os.getppid()
    for _generation in range(_MOST_ANCESTORS):
        if pid <= 1:
            return
        yield pid
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        pid = int(stat.rpartition(")")[2].split()[1])


def _sockets_of(pid: int) -> Generator[socket.socket, None, None]:
    directory = Path(f"/proc/{pid}/fd")
    pidfd = os.pidfd_open(pid)
    try:
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(directory / name).startswith("socket:"):
                    yield socket.socket(fileno=pidfd_getfd(pidfd, int(name)))
    finally:
        os.close(pidfd)


def _ends_of(sock: socket.socket) -> tuple[tuple[str, int], tuple[str, int]] | None:
    """Peer's and own of a TCP connection."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return None
    try:
        peer, own = sock.getpeername(), sock.getsockname()
    except OSError:  # one that listens
        return None
    return _end(peer[0], peer[1]), _end(own[0], own[1])


def _end(address: str, port: int | str) -> tuple[str, int]:
    """As sshd writes it, which has one socket for both families. Raises ValueError."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found), int(port)
