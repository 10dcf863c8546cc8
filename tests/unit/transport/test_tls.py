"""Mutual TLS: who gets in, who does not, and who cannot make the listener wait."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from transport.api import (
    AuthenticationFailed,
    Channel,
    ConnectFailed,
    Deadline,
    DeadlineExpired,
    Frame,
    ProtocolError,
    TransportError,
)
from transport.identity import Identity, create_identity, fingerprint
from transport.tls import TlsConnector, TlsListener, server_handshake

HERE = "127.0.0.1"
SERVER = create_identity("server")
CLIENT = create_identity("client")
STRANGER = create_identity("client")  # the same name, another key


def soon() -> Deadline:
    return Deadline.after(20)


def connector(port: int, *, identity: Identity = CLIENT, peer: Identity = SERVER) -> TlsConnector:
    return TlsConnector(host=HERE, port=port, identity=identity, peer_cert_pem=peer.cert_pem, name="host2")


class Server:
    """A listener that accepts in a thread, as many as come; keeps channels and errors."""

    def __init__(self, trusted: Callable[[], Mapping[str, str]], handshake_s: float = 5.0) -> None:
        self.listener = TlsListener(HERE, 0, identity=SERVER, trusted=trusted)
        self.channels: list[Channel] = []
        self.errors: list[TransportError] = []
        self._trusted = trusted
        self._handshake_s = handshake_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def port(self) -> int:
        return self.listener.port

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(DeadlineExpired):
                sock = self.listener.accept_socket(deadline=Deadline.after(0.05))
                try:
                    self.channels.append(
                        server_handshake(sock, SERVER, self._trusted(), Deadline.after(self._handshake_s))
                    )
                except TransportError as error:
                    self.errors.append(error)

    def wait_for_error(self) -> TransportError:
        give_up_s = time.monotonic() + 10
        while not self.errors and time.monotonic() < give_up_s:
            time.sleep(0.01)
        return self.errors[0]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.listener.close()
        for channel in self.channels:
            channel.close()


@contextmanager
def running(trusted: Callable[[], Mapping[str, str]] | None = None, handshake_s: float = 5.0) -> Iterator[Server]:
    server = Server(trusted or (lambda: {"other": SERVER.cert_pem, "host1": CLIENT.cert_pem}), handshake_s)
    try:
        yield server
    finally:
        server.close()


def test_each_side_knows_the_name_of_the_other() -> None:
    with running() as server, connector(server.port).connect(deadline=soon()) as channel:
        channel.send(Frame.control({"hello": 1}), deadline=soon())
        while not server.channels:
            time.sleep(0.01)
        far = server.channels[0]
        assert far.receive(deadline=soon()).message() == {"hello": 1}
        assert (channel.peer.name, channel.peer.transport) == ("host2", "stream")
        assert channel.peer.detail == f"{HERE}:{server.port}"
        assert (far.peer.name, far.peer.transport) == ("host1", "stream")


def test_a_server_with_another_certificate_is_refused_and_both_are_named() -> None:
    with running() as server:
        with pytest.raises(AuthenticationFailed) as caught:
            connector(server.port, peer=STRANGER).connect(deadline=soon())
        assert fingerprint(SERVER.cert_pem) in caught.value.what
        assert fingerprint(STRANGER.cert_pem) in caught.value.what
        assert "cmigrate host add" in caught.value.hint
        assert not server.channels or not server.channels[0].bytes_received


def test_a_client_with_an_unknown_certificate_is_refused_while_it_connects() -> None:
    with running() as server:
        with pytest.raises(AuthenticationFailed, match="unknown to the peer") as caught:
            connector(server.port, identity=STRANGER).connect(deadline=soon())
        assert "cmigrate host add" in caught.value.hint
        error = server.wait_for_error()
        assert isinstance(error, AuthenticationFailed)
        assert "cmigrate host add" in error.hint


def test_nobody_is_let_in_when_nobody_is_trusted() -> None:
    with running(dict) as server, pytest.raises(AuthenticationFailed):
        connector(server.port).connect(deadline=soon())


def test_a_client_without_a_certificate_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with running() as server:
        with (
            socket.create_connection((HERE, server.port)) as raw,
            context.wrap_socket(raw) as sock,
            pytest.raises(OSError),
        ):
            # The refusal arrives with the first read.
            sock.recv(4) or (_ for _ in ()).throw(OSError)
        assert isinstance(server.wait_for_error(), AuthenticationFailed)


def certificate(subject: Identity, issuer: Identity, begin: datetime.datetime) -> str:
    """A certificate, valid for a day, for the key of `subject` and signed by `issuer`."""
    keys = [serialization.load_pem_private_key(who.key_pem.encode(), None) for who in (subject, issuer)]
    own, signing = (key for key in keys if isinstance(key, ec.EllipticCurvePrivateKey))
    names = [x509.load_pem_x509_certificate(who.cert_pem.encode()).subject for who in (subject, issuer)]
    made = (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(own.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=1))
        .sign(signing, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


def test_a_certificate_signed_by_a_trusted_host_is_not_trusted() -> None:
    child = create_identity("child")
    now = datetime.datetime.now(datetime.UTC)
    signed = replace(child, cert_pem=certificate(child, CLIENT, now - datetime.timedelta(hours=1)))
    with running() as server, pytest.raises(AuthenticationFailed):
        connector(server.port, identity=signed).connect(deadline=soon())


@pytest.mark.parametrize("days", [-900, 900])
def test_a_certificate_whose_dates_do_not_fit_the_clock_is_still_the_pinned_one(days: int) -> None:
    begin = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    other_time = replace(CLIENT, cert_pem=certificate(CLIENT, CLIENT, begin))
    with running(lambda: {"old": other_time.cert_pem}) as server:
        connector(server.port, identity=other_time).connect(deadline=soon()).close()


def test_trust_is_read_anew_for_each_connection() -> None:
    trusted: dict[str, str] = {}
    with running(lambda: trusted) as server:
        with pytest.raises(AuthenticationFailed):
            connector(server.port).connect(deadline=soon())
        trusted["host1"] = CLIENT.cert_pem
        connector(server.port).connect(deadline=soon()).close()
        del trusted["host1"]
        with pytest.raises(AuthenticationFailed):
            connector(server.port).connect(deadline=soon())


def test_tls_1_2_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with running() as server:
        with socket.create_connection((HERE, server.port)) as raw, pytest.raises(ssl.SSLError):
            context.wrap_socket(raw)
        assert isinstance(server.wait_for_error(), ProtocolError)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", bytes(5000)])
def test_a_scanner_that_connects_speaks_garbage_and_leaves_does_no_harm(said: bytes) -> None:
    with running() as server:
        for _ in range(3):
            with socket.create_connection((HERE, server.port)) as sock, contextlib.suppress(OSError):
                sock.sendall(said)
        connector(server.port).connect(deadline=soon()).close()
        assert len(server.errors) == 3
        assert all(isinstance(error, (ProtocolError, ConnectFailed)) for error in server.errors)


def test_a_silent_client_is_given_up_at_the_deadline() -> None:
    with running(handshake_s=0.2) as server, socket.create_connection((HERE, server.port)):
        begin_s = time.monotonic()
        connector(server.port).connect(deadline=soon()).close()
        assert time.monotonic() - begin_s < 30
        assert isinstance(server.errors[0], DeadlineExpired)


def test_a_silent_server_is_given_up_at_the_deadline() -> None:
    with socket.create_server((HERE, 0)) as silent:
        begin_s = time.monotonic()
        with pytest.raises(DeadlineExpired):
            connector(silent.getsockname()[1]).connect(deadline=Deadline.after(0.3))
        assert 0.25 < time.monotonic() - begin_s < 30


def test_a_limit_on_reaching_a_host_is_not_one_on_its_answer() -> None:
    with socket.create_server((HERE, 0), backlog=0) as full:
        limited = replace(connector(full.getsockname()[1]), reach_s=0.2)
        begin_s = time.monotonic()
        with pytest.raises(DeadlineExpired, match="nothing came"):
            limited.connect(deadline=Deadline.after(0.6))
        assert time.monotonic() - begin_s > 0.5
        # Nobody took that connection out of the queue, which has one place: the kernel answers no more.
        begin_s = time.monotonic()
        with pytest.raises(DeadlineExpired, match="did not answer in time"):
            limited.connect(deadline=soon())
        assert time.monotonic() - begin_s < 30


@pytest.mark.parametrize(
    ("said", "error"), [(b"SSH-2.0-OpenSSH_9.2\r\n", ProtocolError), (bytes(100), ProtocolError), (b"", ConnectFailed)]
)
def test_a_server_that_speaks_something_else_is_an_error(said: bytes, error: type[TransportError]) -> None:
    with socket.create_server((HERE, 0)) as other:

        def answer() -> None:
            sock, _ = other.accept()
            with sock:
                sock.sendall(said)
                sock.recv(100_000)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(error):
            connector(other.getsockname()[1]).connect(deadline=soon())
        thread.join()


def test_a_port_that_nobody_listens_on_is_an_error_with_a_hint() -> None:
    with socket.create_server((HERE, 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(ConnectFailed, match=f"port {port}: Connection refused") as caught:
        connector(port).connect(deadline=soon())
    assert "cmigrate serve" in caught.value.hint


def test_a_host_without_an_address_is_an_error() -> None:
    with pytest.raises(ConnectFailed, match="has no address"):
        replace(connector(1), host="no-such-host.invalid").connect(deadline=soon())


def test_a_port_that_is_taken_is_an_error() -> None:
    with (
        TlsListener(HERE, 0, identity=SERVER, trusted=dict) as listener,
        pytest.raises(ConnectFailed, match="in use"),
    ):
        TlsListener(HERE, listener.port, identity=SERVER, trusted=dict)


def test_accepting_ends_at_the_deadline() -> None:
    with TlsListener(HERE, 0, identity=SERVER, trusted=dict) as listener:
        with pytest.raises(DeadlineExpired):
            listener.accept(deadline=Deadline.after(0.05))
        assert listener.fileno() > 2


def test_a_damaged_identity_is_an_error_before_anything_is_sent() -> None:
    broken = replace(CLIENT, key_pem=STRANGER.key_pem)
    with socket.create_server((HERE, 0)) as server, pytest.raises(TransportError, match="damaged"):
        connector(server.getsockname()[1], identity=broken).connect(deadline=soon())


def test_bytes_changed_on_the_way_are_noticed() -> None:
    """A relay in between flips one bit of what the client sends after the handshake."""
    with running() as server, socket.create_server((HERE, 0)) as relay:
        spoil = threading.Event()

        def pump(origin: socket.socket, to: socket.socket, is_client: bool) -> None:
            with contextlib.suppress(OSError):
                while data := origin.recv(65536):
                    if is_client and spoil.is_set():
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    to.sendall(data)
                to.shutdown(socket.SHUT_WR)

        def run() -> None:
            client, _ = relay.accept()
            with client, socket.create_connection((HERE, server.port)) as target:
                back = threading.Thread(target=pump, args=(target, client, False))
                back.start()
                pump(client, target, True)
                back.join()

        thread = threading.Thread(target=run)
        thread.start()
        with connector(relay.getsockname()[1]).connect(deadline=soon()) as channel:
            while not server.channels:
                time.sleep(0.01)
            spoil.set()
            channel.send(Frame.data(1, b"x" * 100), deadline=soon())
            with pytest.raises(ProtocolError):
                server.channels[0].receive(deadline=soon())
            server.channels[0].close()
        thread.join()
