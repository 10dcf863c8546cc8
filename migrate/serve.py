"""The agent: `cmigrate serve`. Takes connections and gives each a process of its own.

A session enters namespaces, starts CRIU and may be killed at any moment; none of that may touch another session. The
agent itself only accepts, forks, reaps: a session's process has everything imported from the start. It is called
SESSION_COMM and does the TLS handshake on the socket it inherits, so that a silent client keeps nobody waiting.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import FrameType

from migrate.answers import register_handlers
from migrate.errors import MigrateError
from migrate.inventory import Inventory
from migrate.recover import recover
from migrate.session import Dispatcher
from migrate.waiting import HandedOver
from runtime.caller import ssh_socket
from runtime.errors import RuntimeFault
from runtime.forked import Forked, fork
from runtime.host import HostConfig, load_host_config
from transport.api import Channel, Deadline, Peer, TransportError
from transport.local import from_stdio
from transport.renewable import RenewableChannel
from transport.tcp import accept, listen, notice_death
from transport.tls import HANDSHAKE_S, server_handshake

MAX_SESSIONS = 32
SESSION_COMM = "cmig-session"
"""What a session's process is called; its arguments are the agent's."""
GRACE_S = 10.0
"""How long sessions may take to undo what they were at when the agent is told to end."""


def say(text: str) -> None:
    """To stderr, which systemd keeps; stdout may carry the protocol."""
    # The SSH session whose stderr it was may be gone.
    with contextlib.suppress(OSError):
        print(f"cmigrate serve: {text}", file=sys.stderr, flush=True)


def run_session(channel: Channel, host: HostConfig) -> bool:
    """Answer one peer until it leaves. Whether that went without an error; an error is told to the peer and on stderr.

    SIGTERM cuts the channel: what waits for the peer fails as if the link had broken, and undoes what it must.
    """

    def cut(_number: int, _frame: FrameType | None) -> None:
        channel.abort()

    # A move goes on when another connection is put underneath.
    channel = RenewableChannel(channel)
    before = signal.signal(signal.SIGTERM, cut)
    register_handlers()
    handed: HandedOver | None = None
    try:
        Dispatcher(channel, host).run()
    except HandedOver as handing:
        handed = handing
    except (MigrateError, RuntimeFault, TransportError, OSError) as error:
        say(f"session with {channel.peer.name} ({channel.peer.detail}): {error}")
        return False
    finally:
        signal.signal(signal.SIGTERM, before)
        channel.close()
    if handed is not None and channel.peer.transport == "ssh":
        handed.wait()  # an SSH server ends the connection with the program that it started
    return True


def serve_stdio(host: HostConfig, peer_name: str = "") -> bool:
    """One session over descriptors 0 and 1, as an SSH server starts it."""
    sock = ssh_socket()
    if sock is not None:
        with sock, contextlib.suppress(OSError):
            notice_death(sock)
    origin = os.environ.get("SSH_CONNECTION", "").split()
    detail = f"ssh from {origin[0]}" if origin else "stdin and stdout"
    return run_session(from_stdio(Peer(name=peer_name or "caller", transport="ssh", detail=detail)), host)


def serve_socket(fd: int, host: HostConfig) -> bool:
    """One session over an accepted TCP connection. Who is not in the inventory gets no further than the handshake."""
    sock = socket.socket(fileno=fd)
    inventory = Inventory(host)
    for problem in inventory.problems():
        say(f"{problem} is left out: {problem.hint}")
    try:
        channel = server_handshake(sock, inventory.identity(), inventory.trusted(), Deadline.after(HANDSHAKE_S))
    except TransportError as error:
        say(f"a connection was refused: {error}")
        return False
    return run_session(channel, host)


class Agent:
    """Listens on one address until told to end. Single use; call ``run`` from the main thread."""

    def __init__(
        self,
        host: HostConfig,
        *,
        listen_on: str,
        port: int,
        max_sessions: int = MAX_SESSIONS,
        grace_s: float = GRACE_S,
    ) -> None:
        self._host = host
        self._listen_on = listen_on
        self._port = port
        self._max_sessions = max_sessions
        self._grace_s = grace_s
        self._sessions: list[Forked] = []
        self._ending = False

    def run(self) -> None:
        """Raises ConnectFailed when the address is taken. Returns after SIGTERM or SIGINT, with all sessions over."""
        for line in recover(self._host):
            say(line)
        Inventory(self._host).identity()  # whoever comes first must not wait for a key to be made
        with ExitStack() as undo:
            wake = undo.enter_context(_signals(self._end))
            listener = listen(self._listen_on, self._port)
            undo.callback(listener.close)
            undo.callback(self._end_sessions)
            port = listener.getsockname()[1]
            say(f"{self._host.name} listens on {self._listen_on} port {port}")
            notify(f"READY=1\nSTATUS=listening on {self._listen_on} port {port}")
            while not self._ending:
                self._step(listener, wake)
            notify("STOPPING=1")

    def _end(self) -> None:
        self._ending = True

    def _step(self, listener: socket.socket, wake: socket.socket) -> None:
        """Wait for a connection or a signal. With all sessions taken connections queue in the kernel: a client's own
        deadline decides how long it waits, or that it goes another way."""
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        if len(self._sessions) < self._max_sessions:
            poll.register(listener, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if wake.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
        self._reap()
        if listener.fileno() in ready and not self._ending:
            self._start_session(listener)

    def _start_session(self, listener: socket.socket) -> None:
        try:
            sock = accept(listener, deadline=Deadline.after(0))
        except (TransportError, OSError) as error:
            say(f"a connection could not be taken: {error}")
            time.sleep(0.05)  # out of descriptors, say: it stays so for a moment, and the listener stays readable
            return
        with sock:
            try:
                session = fork(lambda: self._serve(sock), keep=[sock.fileno()], comm=SESSION_COMM)
            except OSError as error:
                say(f"no session could be started: {error}")
            else:
                self._sessions.append(session)

    def _serve(self, sock: socket.socket) -> int:
        """In the session's process. The configuration is read anew: agents run for long."""
        os.environ["CMIGRATE_CONFIG"] = str(self._host.config_dir)
        return 0 if serve_socket(sock.detach(), load_host_config(self._host.config_dir)) else 1

    def _reap(self) -> None:
        for session in [session for session in self._sessions if session.poll() is not None]:
            self._sessions.remove(session)
            if session.returncode is not None and session.returncode < 0:
                say(f"session process {session.pid} was killed by signal {-session.returncode}")

    def _end_sessions(self) -> None:
        for session in self._sessions:
            session.terminate()
        limit_s = time.monotonic() + self._grace_s
        for session in self._sessions:
            try:
                session.wait(max(0.0, limit_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                say(f"session process {session.pid} did not end within {self._grace_s:g} s and is killed")
                session.kill()
                session.wait()


@contextlib.contextmanager
def _signals(end: Callable[[], None]) -> Iterator[socket.socket]:
    """Calls ``end`` on SIGTERM and SIGINT; the socket becomes readable at these and at the end of a child."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ExitStack() as undo:
        for end_of_pair in (ours, theirs):
            end_of_pair.setblocking(False)
        undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False))
        handlers = {
            signal.SIGTERM: lambda _number, _frame: end(),
            signal.SIGINT: lambda _number, _frame: end(),
            signal.SIGCHLD: lambda _number, _frame: None,
        }
        for number, handler in handlers.items():
            undo.callback(signal.signal, number, signal.signal(number, handler))
        yield ours


def notify(state: str) -> None:
    """sd_notify(3): tell the service manager, where there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock, contextlib.suppress(OSError):
        sock.sendto(state.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
