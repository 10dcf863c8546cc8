"""TCP sockets as this package wants them: dialled within a deadline, quick to send, quick to notice a dead peer."""

from __future__ import annotations

import select
import socket

from transport.api import ConnectFailed, Deadline, DeadlineExpired

KEEPALIVE_IDLE_S = 10
KEEPALIVE_EVERY_S = 5
KEEPALIVE_PROBES = 3
USER_TIMEOUT_MS = 25_000
"""Unacknowledged data ends the connection after as long as an idle dead peer is given (10 + 3 * 5 s)."""


def tune(sock: socket.socket) -> None:
    """Set what every connection gets. Buffer sizes are left to the kernel: SO_SNDBUF and SO_RCVBUF would switch off its
    own tuning, which on a long path grows further than net.core.[rw]mem_max lets us ask for."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    notice_death(sock)


def notice_death(sock: socket.socket) -> None:
    """The connection ends soon after the peer's host, or the way there, is gone. One that answers is never given up
    for being idle: the kernel does that, whatever the program at the other end is at."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_EVERY_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def dial(host: str, port: int, *, deadline: Deadline, hint: str) -> socket.socket:
    """Connect to the first address of `host` that answers. `hint` says what to do when none does."""
    try:
        # Asking a name server is the one step that does not know the deadline; its own limits are in resolv.conf.
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectFailed(f"{host} has no address: {error.strerror}", hint="check the name of the host") from error
    failure: OSError | None = None
    for family, kind, protocol, _, address in addresses:
        if deadline.expired():
            break
        sock = socket.socket(family, kind, protocol)
        try:
            tune(sock)
            # 0 would mean "do not wait": an expired deadline still gets one instant.
            remaining = deadline.remaining()
            sock.settimeout(None if remaining is None else max(remaining, 0.001))
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    if failure is None or failure.errno is None or deadline.expired():
        raise DeadlineExpired(f"{host} port {port} did not answer in time", hint=hint)
    raise ConnectFailed(f"cannot connect to {host} port {port}: {failure.strerror}", hint=hint) from failure


def listen(host: str, port: int) -> socket.socket:
    """A non-blocking listening socket; port 0 lets the kernel choose. Raises ConnectFailed when it is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConnectFailed(f"cannot listen on {host}: {error.strerror}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(64)
    except OSError as error:
        sock.close()
        raise ConnectFailed(
            f"cannot listen on {host} port {port}: {error.strerror}", hint="another program has it; choose another port"
        ) from error
    sock.setblocking(False)
    return sock


def accept(listener: socket.socket, *, deadline: Deadline) -> socket.socket:
    """The next connection; raises DeadlineExpired. One that was gone before it could be taken is passed over."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        remaining = deadline.remaining()
        if not poll.poll(None if remaining is None else remaining * 1000):
            raise DeadlineExpired("nobody connected in time")
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            continue
        tune(sock)
        return sock
