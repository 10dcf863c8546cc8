"""Reading what the other end of a SOCK_SEQPACKET pair said, to the last word.

Only the standard library: the stand-alone programs of runtime/memory import this.
"""

from __future__ import annotations

import socket


def receive(sock: socket.socket, most_bytes: int, most_descriptors: int = 0) -> tuple[bytes, list[int]]:
    """The next message and the descriptors in it; ``b""`` once the other end is gone and all it said has been heard.

    An end that closes without having read everything makes the kernel say so, once and first (ECONNRESET): what it had
    said before still waits behind that. Raises TimeoutError and OSError as recvmsg(2) does.
    """
    try:
        return _receive(sock, most_bytes, most_descriptors)
    except ConnectionResetError:
        return _receive(sock, most_bytes, most_descriptors)


def _receive(sock: socket.socket, most_bytes: int, most_descriptors: int) -> tuple[bytes, list[int]]:
    if not most_descriptors:
        return sock.recv(most_bytes), []
    data, descriptors, _flags, _address = socket.recv_fds(sock, most_bytes, most_descriptors)
    return data, descriptors
