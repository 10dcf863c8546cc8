"""A helper of the monitor's in the container's memory cgroup: takes memory for files that others fill. Stdlib only.

Memory of a file is charged to the cgroup of whoever takes it from the kernel, which for shared memory that a move has
brought would be the agent's. So this process takes it (fallocate), and the agent writes to what is there.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

MAX_SPANS = 4096
TIMEOUT_S = 20.0
_SPAN = struct.Struct("=2Q")
_MEMORY_FILES = ("memory.current", "memory.usage_in_bytes")


def serve(sock: socket.socket, cgroup_paths: Sequence[str]) -> None:
    """Until the other end is closed. A datagram is a list of spans with the file's descriptor; the answer is empty of
    meaning, and that it fails is no failure of the move."""
    for path in cgroup_paths:
        if any(Path(path, name).exists() for name in _MEMORY_FILES):
            Path(path, "cgroup.procs").write_text("0")
    while True:
        data, fds, _flags, _address = socket.recv_fds(sock, MAX_SPANS * _SPAN.size, 1)
        if not fds:
            return
        try:
            for offset, size in _SPAN.iter_unpack(data):
                os.posix_fallocate(fds[0], offset, size)
        finally:
            os.close(fds[0])
        sock.send(b"taken")


class Charger:
    """The agent's end. Once the helper has failed, memory is charged to the agent: less right, no reason to stop."""

    def __init__(self) -> None:
        self._sock, self.helpers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(TIMEOUT_S)
        self._works = True

    def take(self, fd: int, spans: Sequence[tuple[int, int]]) -> None:
        """(offset, size in bytes) that are about to be written to this file, whose size they may enlarge."""
        for first in range(0, len(spans), MAX_SPANS):
            if self._works:
                data = b"".join(_SPAN.pack(*span) for span in spans[first : first + MAX_SPANS])
                try:
                    socket.send_fds(self._sock, [data], [fd])
                    self._works = bool(self._sock.recv(16))
                except OSError:
                    self._works = False

    def started(self) -> None:
        """The helper has its end."""
        self.helpers.close()

    def close(self) -> None:
        self._sock.close()
        self.helpers.close()
        self._works = False
