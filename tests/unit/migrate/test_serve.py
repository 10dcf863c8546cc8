"""The agent as a process: it takes connections, limits them, and ends when told to. On loopback, without root."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from migrate.inventory import HostEntry, Inventory
from migrate.links import Session, connect
from migrate.session import exchange_hello, ping
from runtime.host import HostConfig
from transport.api import AuthenticationFailed, ChannelClosed, ConnectFailed, Deadline, Frame
from transport.identity import create_identity
from transport.local import spawn

TIMEOUT_S = 30.0
AGENT = """
import sys
from migrate.serve import Agent
from runtime.host import load_host_config
sessions, grace_s = int(sys.argv[1]), float(sys.argv[2])
Agent(load_host_config(), listen_on="127.0.0.1", port=0, max_sessions=sessions, grace_s=grace_s).run()
"""


class RunningAgent:
    """An agent of ``theirs`` in a process of its own, and ``ours``, which knows it."""

    def __init__(self, directory: Path, *, max_sessions: int = 8, grace_s: float = 5.0) -> None:
        self.directory = directory
        (directory / "theirs").mkdir()
        (directory / "theirs" / "config.toml").write_text('name = "theirs"\n')
        self.ours = HostConfig(name="ours", config_dir=directory / "ours")
        self.theirs = HostConfig(name="theirs", config_dir=directory / "theirs")
        self.ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ready.bind(str(directory / "notify"))
        self.ready.settimeout(TIMEOUT_S)
        self.log = directory / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", AGENT, str(max_sessions), str(grace_s)],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={
                    **os.environ,
                    "CMIGRATE_CONFIG": str(self.theirs.config_dir),
                    "NOTIFY_SOCKET": str(directory / "notify"),
                },
            )
        said = self.ready.recv(1000).decode()
        assert said.startswith("READY=1\n")
        self.port = int(said.split()[-1])
        self.introduce()

    def introduce(self) -> None:
        ours, theirs = Inventory(self.ours), Inventory(self.theirs)
        ours.add(
            HostEntry(
                name="theirs",
                stream_host="127.0.0.1",
                stream_port=self.port,
                certificate_pem=theirs.identity().cert_pem,
            )
        )
        theirs.add(HostEntry(name="ours", certificate_pem=ours.identity().cert_pem))

    def connect(self, timeout_s: float = TIMEOUT_S) -> Session:
        return connect(self.ours, "theirs", transport="stream", deadline=Deadline.after(timeout_s))

    def end(self) -> int:
        self.process.terminate()
        code = self.process.wait(TIMEOUT_S)
        self.ready.close()
        return code


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    agent = RunningAgent(tmp_path)
    yield agent
    assert agent.end() == 0, agent.log.read_text()


def test_sessions_at_once_do_not_wait_for_each_other(agent: RunningAgent) -> None:
    with agent.connect() as first, agent.connect() as second:
        for token, session in enumerate((second, first)):
            ping(session.channel, token, Deadline.after(TIMEOUT_S))
        assert (first.peer_hello.host, first.channel.peer.name) == ("theirs", "theirs")


def test_a_host_is_known_from_the_moment_it_is_added(agent: RunningAgent) -> None:
    Inventory(agent.theirs).remove("ours")
    with pytest.raises(AuthenticationFailed):
        agent.connect()
    Inventory(agent.theirs).add(HostEntry(name="ours", certificate_pem=Inventory(agent.ours).identity().cert_pem))
    agent.connect().close()


def test_a_stranger_gets_no_further_than_the_handshake(agent: RunningAgent) -> None:
    stranger = HostConfig(name="stranger", config_dir=agent.directory / "stranger")
    Inventory(stranger).add(Inventory(agent.ours).get("theirs"))
    with pytest.raises(AuthenticationFailed, match="unknown to the peer"):
        connect(stranger, "theirs", deadline=Deadline.after(TIMEOUT_S), transport="stream")
    wait_for_sessions_to_end(agent)  # it writes after it has told the client
    assert "refused" in agent.log.read_text()


def test_an_agent_that_shows_another_certificate_is_refused(agent: RunningAgent) -> None:
    entry = Inventory(agent.ours).get("theirs")
    wrong = HostEntry(
        name="theirs",
        stream_host=entry.stream_host,
        stream_port=entry.stream_port,
        certificate_pem=create_identity("theirs").cert_pem,
    )
    with pytest.raises(AuthenticationFailed, match="expected is SHA256:"):
        connect(agent.ours, wrong, transport="stream", deadline=Deadline.after(TIMEOUT_S))


def test_a_client_that_says_nothing_or_nonsense_keeps_nobody_waiting(agent: RunningAgent) -> None:
    with ExitStack() as stack:
        for words in (b"", b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096)):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", agent.port), TIMEOUT_S))
            client.sendall(words)
        begin = time.monotonic()
        agent.connect().close()
        assert time.monotonic() - begin < 30


def test_sigterm_ends_agent_and_sessions_soon(tmp_path: Path) -> None:
    agent = RunningAgent(tmp_path)
    with agent.connect() as session:
        begin = time.monotonic()
        assert agent.end() == 0
        assert time.monotonic() - begin < 30
        with pytest.raises(ChannelClosed):
            session.channel.receive(deadline=Deadline.after(TIMEOUT_S))
    with pytest.raises(ConnectFailed):
        agent.connect()


def test_a_session_that_does_not_end_in_time_is_killed(tmp_path: Path) -> None:
    agent = RunningAgent(tmp_path, grace_s=0.3)
    with agent.connect():
        session = next(pid for pid in children(agent.process.pid))
        os.kill(session, signal.SIGSTOP)
        assert agent.end() == 0
    assert "is killed" in agent.log.read_text()


def test_more_connections_than_sessions_wait_their_turn(tmp_path: Path) -> None:
    agent = RunningAgent(tmp_path, max_sessions=1)
    try:
        with agent.connect(), pytest.raises(Exception, match="time"):
            agent.connect(timeout_s=1.0)
        agent.connect().close()
    finally:
        assert agent.end() == 0


def test_a_session_that_ends_is_reaped_without_a_new_connection(agent: RunningAgent) -> None:
    agent.connect().close()
    wait_for_sessions_to_end(agent)


def wait_for_sessions_to_end(agent: RunningAgent) -> None:
    limit_s = time.monotonic() + TIMEOUT_S
    while children(agent.process.pid):
        assert time.monotonic() < limit_s
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_over_stdin_and_stdout_a_stray_print_does_not_get_into_the_protocol() -> None:
    program = "from migrate.serve import serve_stdio; from runtime.host import HostConfig; import sys;"
    program += "print('a stray word'); sys.exit(not serve_stdio(HostConfig(name='theirs'), 'ours'))"
    with spawn([sys.executable, "-c", program]) as channel:
        assert exchange_hello(channel, "ours", Deadline.after(TIMEOUT_S)).host == "theirs"
        ping(channel, 1, Deadline.after(TIMEOUT_S))


def test_a_second_hello_is_an_unknown_message(agent: RunningAgent) -> None:
    with agent.connect() as session:
        session.channel.send(Frame.control({"type": "hello"}), deadline=Deadline.after(TIMEOUT_S))
        answer = session.channel.receive(deadline=Deadline.after(TIMEOUT_S)).message()
        assert answer["code"] == "unknown-message"
