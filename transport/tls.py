"""`stream://`: the protocol over TCP with mutual TLS 1.3 and pinned certificates.

When both ends offer it (ALPN), the server's first words are two keys, and everything after them goes in records of our
own: see transport/sealed.py.

Each side trusts exact certificates and nothing else, so neither names nor dates nor authorities matter. In TLS 1.3 the
client's handshake ends before the server has looked at the client's certificate; so the server says GREETING when it
has, and `connect` waits for that: a refused certificate is an error of `connect`, not of the first message.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from transport.api import (
    AuthenticationFailed,
    Channel,
    ConnectFailed,
    Deadline,
    Peer,
    ProtocolError,
    TransportError,
)
from transport.channel import StreamChannel
from transport.closing import Closing
from transport.identity import (
    Identity,
    certificate_der,
    create_identity,
    fingerprint,
    fingerprint_der,
    load_or_create_identity,
)
from transport.sealed import KEY_BYTES, SealedStream, new_key, supported
from transport.streams import ByteStream, Waker, pieces, shut_down
from transport.tcp import accept, dial, listen

__all__ = [
    "Identity",
    "TlsConnector",
    "TlsListener",
    "create_identity",
    "fingerprint",
    "load_or_create_identity",
    "server_handshake",
]

GREETING = b"CMG1"
HANDSHAKE_S = 10.0
"""Longest that a server waits for a client to finish its handshake."""

_SEALED = "cmigrate-sealed/1"
_RECORD_BYTES = 16384
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL's x509_vfy.h; Python has no name for it.
_TRUST_HINT = "run `cmigrate host add` for that host, so that both hosts know each other's certificates"


def _context(protocol: int, identity: Identity, *, sealed: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    if sealed and supported():
        context.set_alpn_protocols([_SEALED])
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # OpenSSL's Python binding only reads files; this one is never on a disk.
    fd = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        os.write(fd, (identity.cert_pem + identity.key_pem).encode())
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    except ssl.SSLError as error:
        raise TransportError(f"this host's certificate or key is damaged: {error.reason}") from error
    finally:
        os.close(fd)
    return context


def _client_context(identity: Identity, *, sealed: bool) -> ssl.SSLContext:
    # OpenSSL checks nothing about the server here, because `connect` compares its certificate with the pinned one
    # before a byte is sent, and can then name both; the handshake proves that the server has the key either way.
    return _context(ssl.PROTOCOL_TLS_CLIENT, identity, sealed=sealed)


def _server_context(identity: Identity, trusted: Mapping[str, str], *, sealed: bool) -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity, sealed=sealed)
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags = ssl.VerifyFlags(context.verify_flags | _NO_CHECK_TIME)
    # A resumed session would skip the look at the certificate.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    if trusted:
        context.load_verify_locations(cadata=b"".join(certificate_der(pem) for pem in trusted.values()))
    return context


class TlsStream:
    """A byte stream over one TLS session whose handshake is still to be done."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        sock.setblocking(False)
        self._socket = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
        self._waker = Waker()
        # An OpenSSL session must not be used by two threads at once, and Python 3.11 does not take care of that. The
        # socket does not block, so the lock is held for the time of a cipher and a system call.
        self._lock = threading.Lock()

    def handshake(self, deadline: Deadline) -> bytes:
        """Returns the peer's certificate (DER). Raises TransportError of several kinds, and OSError."""
        while True:
            events = 0
            with self._lock, _translated():
                self._waker.check()
                try:
                    self._socket.do_handshake()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                    events = _wanted(error)
            if not events:
                break
            self._waker.wait(self._socket.fileno(), events, deadline)
        der = self._socket.getpeercert(binary_form=True)
        if der is None:
            raise AuthenticationFailed("the peer showed no certificate", hint=_TRUST_HINT)
        return der

    @property
    def sealed(self) -> bool:
        """After the handshake: both ends want records of our own."""
        return self._socket.selected_alpn_protocol() == _SEALED

    def release(self) -> socket.socket:
        """The socket as it is, with nothing of the session left in it to read; this stream is of no more use."""
        self._waker.close()
        return socket.socket(fileno=self._socket.detach())

    def read_into(self, buffer: memoryview, deadline: Deadline) -> int:
        while True:
            count, events = self._transfer(self._socket.recv_into, buffer)
            if count or not events:
                return count
            self._waker.wait(self._socket.fileno(), events, deadline)

    def write_all(self, buffers: Sequence[memoryview], deadline: Deadline) -> None:
        for piece in pieces(buffers, _RECORD_BYTES):
            rest = piece
            while rest:
                count, events = self._transfer(self._socket.send, rest)
                rest = rest[count:]
                if events:
                    self._waker.wait(self._socket.fileno(), events, deadline)

    def _transfer(self, call: Callable[[memoryview], int], view: memoryview) -> tuple[int, int]:
        """Repeat `call`, which moves one TLS record at most, until `view` is done or it cannot go on. Returns the bytes
        moved and the poll events to wait for (0: none). An error after some bytes is left for the next call to meet."""
        count = 0
        with self._lock, _translated():
            self._waker.check()
            try:
                while count < view.nbytes and (got := call(view[count:])):
                    count += got
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                return count, _wanted(error)
            except OSError:
                if not count:
                    raise
        return count, 0

    def readable(self, timeout_s: float) -> bool:
        with self._lock:
            if self._socket.pending():
                return True
        return self._waker.ready(self._socket.fileno(), select.POLLIN, timeout_s)

    def wake(self) -> None:
        self._waker.wake()

    def abort(self) -> None:
        self._waker.wake()
        shut_down(self._socket)

    def close(self) -> None:
        try:
            # Sends the end-of-session alert; the peer's own is not waited for, hence the error.
            self._socket.unwrap()
        except (OSError, ValueError):
            pass
        finally:
            self._socket.close()
            self._waker.close()

    def last_words(self) -> str:
        return ""


# What OpenSSL calls the cases in which one side did not like the other's certificate.
_AUTHENTICATION_REASONS = (
    "CERTIFICATE_VERIFY_FAILED",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE",
    "ALERT_UNKNOWN_CA",
    "ALERT_BAD_CERTIFICATE",
    "ALERT_CERTIFICATE",
    "ALERT_DECRYPT_ERROR",
    "ALERT_ACCESS_DENIED",
)


def _wanted(error: ssl.SSLWantReadError | ssl.SSLWantWriteError) -> int:
    return select.POLLIN if isinstance(error, ssl.SSLWantReadError) else select.POLLOUT


@contextmanager
def _translated() -> Iterator[None]:
    """OpenSSL's errors as ours, except that the end of the connection is an OSError as on any socket."""
    try:
        yield
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        raise ConnectionResetError(errno.ECONNRESET, "the TLS session ended") from error
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        if any(known in reason for known in _AUTHENTICATION_REASONS):
            whose = "this host's certificate is unknown to the peer" if "ALERT" in reason else "unknown certificate"
            raise AuthenticationFailed(f"{whose} ({reason})", hint=_TRUST_HINT) from error
        raise ProtocolError(f"the peer does not speak TLS 1.3 as expected ({reason})") from error


@dataclass(frozen=True, kw_only=True)
class TlsConnector:
    """Reaches the agent at host:port, which must show exactly the certificate `peer_cert_pem`.

    `reach_s` bounds the TCP connection alone: who has another way to go learns soon that nobody is there, and a busy
    agent still has its time. Without ``sealed`` all goes by TLS, as with an older agent.
    """

    host: str
    port: int
    identity: Identity
    peer_cert_pem: str
    name: str
    reach_s: float | None = None
    sealed: bool = True

    def connect(self, *, deadline: Deadline) -> Channel:
        expected = certificate_der(self.peer_cert_pem)
        context = _client_context(self.identity, sealed=self.sealed)
        reach = deadline if self.reach_s is None else deadline.within(self.reach_s)
        sock = dial(self.host, self.port, deadline=reach, hint="is `cmigrate serve` running there, and the port open?")
        tls = TlsStream(sock, context, server_side=False)
        try:
            self._check(tls.handshake(deadline), expected)
            self._expect_greeting(tls, deadline)
            keys = self._expect(tls, 2 * KEY_BYTES, deadline) if tls.sealed else b""
        except BaseException as error:
            tls.close()
            if isinstance(error, OSError):
                raise ConnectFailed(f"{self._where} ended the handshake: {error.strerror}") from error
            raise
        stream: ByteStream = _sealed(tls, keys[:KEY_BYTES], keys[KEY_BYTES:]) if keys else tls
        return StreamChannel(stream, Peer(name=self.name, transport="stream", detail=f"{self.host}:{self.port}"))

    @property
    def _where(self) -> str:
        return f"{self.name} ({self.host} port {self.port})"

    def _check(self, shown: bytes, expected: bytes) -> None:
        if shown != expected:
            raise AuthenticationFailed(
                f"{self._where} shows certificate {fingerprint_der(shown)}, expected is {fingerprint_der(expected)}",
                hint=f"if {self.name} was set up again, run `cmigrate host add` for it; if not, someone is in between",
            )

    def _expect_greeting(self, tls: TlsStream, deadline: Deadline) -> None:
        received = self._expect(tls, len(GREETING), deadline)
        if received != GREETING:
            raise ProtocolError(f"{self._where} is no cmigrate agent, or of an unknown version: it greets {received!r}")

    def _expect(self, tls: TlsStream, length: int, deadline: Deadline) -> bytes:
        received = bytearray(length)
        count = 0
        while count < length:
            got = tls.read_into(memoryview(received)[count:], deadline)
            if not got:
                raise ConnectFailed(f"{self._where} hung up after the handshake", hint="see the agent's log there")
            count += got
        return bytes(received)


def _sealed(tls: TlsStream, send_key: bytes, receive_key: bytes) -> SealedStream:
    return SealedStream(tls.release(), send_key=send_key, receive_key=receive_key)


def server_handshake(
    sock: socket.socket, identity: Identity, trusted: Mapping[str, str], deadline: Deadline, *, sealed: bool = True
) -> Channel:
    """Take over a socket that was accepted. `trusted` maps names of hosts to their certificates (PEM); the channel's
    peer gets the name. Raises AuthenticationFailed, ProtocolError, ConnectFailed (client left) or DeadlineExpired,
    each after closing the socket: nothing a client does here takes longer than the deadline."""
    try:
        address = sock.getpeername()
        tls = TlsStream(sock, _server_context(identity, trusted, sealed=sealed), server_side=True)
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise ConnectFailed(f"a client left before the handshake: {error.strerror}") from error
        raise
    where = f"{address[0]}:{address[1]}"
    try:
        shown = tls.handshake(deadline)
        name = next((name for name, pem in trusted.items() if certificate_der(pem) == shown), None)
        if name is None:
            raise AuthenticationFailed(f"{where} shows unknown certificate {fingerprint_der(shown)}", hint=_TRUST_HINT)
        keys = (new_key(), new_key()) if tls.sealed else ()
        tls.write_all([memoryview(b"".join((GREETING, *keys)))], deadline)
    except BaseException as error:
        tls.close()
        if isinstance(error, OSError):
            raise ConnectFailed(f"{where} left during the handshake: {error.strerror}") from error
        raise
    stream: ByteStream = _sealed(tls, keys[1], keys[0]) if keys else tls
    return StreamChannel(stream, Peer(name=name, transport="stream", detail=where))


class TlsListener(Closing):
    """Listens on one address. `trusted` is asked anew for each connection."""

    def __init__(self, host: str, port: int, *, identity: Identity, trusted: Callable[[], Mapping[str, str]]) -> None:
        self._identity = identity
        self._trusted = trusted
        self._socket = listen(host, port)

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept_socket(self, *, deadline: Deadline) -> socket.socket:
        """The next connection as it came, without a word exchanged: for `server_handshake`, here or in a process of its
        own, so that a client that says nothing keeps nobody else waiting. Raises DeadlineExpired."""
        return accept(self._socket, deadline=deadline)

    def accept(self, *, deadline: Deadline) -> Channel:
        """The next connection with its handshake, which gets HANDSHAKE_S at most. Raises as `server_handshake` does;
        the listener goes on listening."""
        sock = self.accept_socket(deadline=deadline)
        return server_handshake(sock, self._identity, self._trusted(), deadline.within(HANDSHAKE_S))

    def close(self) -> None:
        self._socket.close()
