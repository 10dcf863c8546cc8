"""The record layer of `stream://`: AES-256-GCM in records of up to 256 KiB, under keys that came over TLS.

TLS does what it is good at: it proves who both ends are and gives them a secret nobody else knows. For bulk its records
of 16 KiB cost more than the cipher does: one call and one system call each to send, two to receive. Here a record goes
by one call, and is opened straight into the memory where it belongs.

    4 bytes   length of the text, 1 to RECORD_BYTES, big-endian; authenticated, not secret
    length    ciphertext
    16 bytes  tag

Each direction has a key and counts its records: the number is the nonce, so none can be changed, left out, repeated or
swapped. A key is used for RECORDS_PER_KEY records and then replaced by one derived from it.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from transport.api import Deadline, ProtocolError
from transport.streams import SocketStream

KEY_BYTES = 32
RECORD_BYTES = 256 * 1024
"""Measured: text and ciphertext of a record together stay in a processor's own cache."""
RECORDS_PER_KEY = 1 << 16
"""16 GiB, far within what RFC 8446 (5.5) allows AES-GCM under one key."""

_LENGTH_BYTES = 4
_TAG_BYTES = 16
_NONCE_BYTES = 12
# Buffers that are together no longer than this go as one record: a control frame and its header.
_JOINED_BYTES = 16 * 1024


def supported() -> bool:
    """Whether the library can work in memory that we name; older ones only return new bytes, which costs the gain."""
    return hasattr(AESGCM, "encrypt_into") and hasattr(AESGCM, "decrypt_into")


def new_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


class _Key:
    """One direction's cipher and the number of the next record."""

    def __init__(self, secret: bytes, records_per_key: int, number: int = 0) -> None:
        self._secret = secret
        self._records_per_key = records_per_key
        self._number = number
        self.cipher = AESGCM(secret)

    @property
    def standing(self) -> tuple[bytes, int]:
        """What another process needs to go on: the secret in use and the number of the next record."""
        return self._secret, self._number

    @property
    def nonce(self) -> bytes:
        return self._number.to_bytes(_NONCE_BYTES, "big")

    def used(self) -> None:
        self._number += 1
        if self._number % self._records_per_key == 0:
            self._secret = HKDFExpand(SHA256(), KEY_BYTES, b"cmigrate sealed next key").derive(self._secret)
            self.cipher = AESGCM(self._secret)


class SealedStream(SocketStream):
    """A connected socket, taken over, whose every byte from here on is in records. The two directions share nothing."""

    def __init__(
        self, sock: socket.socket, *, send_key: bytes, receive_key: bytes, records_per_key: int = RECORDS_PER_KEY
    ) -> None:
        super().__init__(sock)
        self._send_key = _Key(send_key, records_per_key)
        self._receive_key = _Key(receive_key, records_per_key)
        self._out = memoryview(bytearray(_LENGTH_BYTES + RECORD_BYTES + _TAG_BYTES))
        self._in = memoryview(bytearray(_LENGTH_BYTES + RECORD_BYTES + _TAG_BYTES))
        self._arrived = 0
        self._opened = memoryview(bytearray(RECORD_BYTES))
        self._unread = self._opened[:0]

    def standing(self) -> dict[str, object] | None:
        """Of both directions, for ``going_on`` in another process that gets the socket as well; None while something
        that has arrived was not read. This stream must not be used afterwards: no nonce may come twice."""
        if self._arrived or self._unread:
            return None
        (send_secret, sent), (receive_secret, received) = self._send_key.standing, self._receive_key.standing
        return {"send": send_secret, "sent": sent, "receive": receive_secret, "received": received}

    @classmethod
    def going_on(cls, sock: socket.socket, standing: Mapping[str, Any]) -> Self:
        """The stream that ``standing`` was taken of."""
        stream = cls(sock, send_key=standing["send"], receive_key=standing["receive"])
        stream._send_key = _Key(standing["send"], RECORDS_PER_KEY, standing["sent"])
        stream._receive_key = _Key(standing["receive"], RECORDS_PER_KEY, standing["received"])
        return stream

    def read_into(self, buffer: memoryview, deadline: Deadline) -> int:
        if not self._unread:
            length = self._whole_record(deadline)
            if not length:
                return 0
            if length <= buffer.nbytes:
                self._open(length, buffer[:length])
                return length
            self._open(length, self._opened[:length])
            self._unread = self._opened[:length]
        count = min(len(self._unread), buffer.nbytes)
        buffer[:count] = self._unread[:count]
        self._unread = self._unread[count:]
        return count

    def write_all(self, buffers: Sequence[memoryview], deadline: Deadline) -> None:
        for text in _texts(buffers):
            super().write_all([self._seal(text)], deadline)

    def readable(self, timeout_s: float) -> bool:
        return bool(self._unread) or super().readable(timeout_s)

    def _seal(self, text: memoryview) -> memoryview:
        end = _LENGTH_BYTES + text.nbytes + _TAG_BYTES
        length = text.nbytes.to_bytes(_LENGTH_BYTES, "big")
        self._out[:_LENGTH_BYTES] = length
        key = self._send_key
        key.cipher.encrypt_into(key.nonce, text, length, self._out[_LENGTH_BYTES:end])
        key.used()
        return self._out[:end]

    def _whole_record(self, deadline: Deadline) -> int:
        """Length of the text of the record that is complete in ``_in``; 0 at the end of the stream."""
        wanted = _LENGTH_BYTES
        length = 0
        while True:
            while self._arrived < wanted:
                count = super().read_into(self._in[self._arrived : wanted], deadline)
                if not count:
                    return 0
                self._arrived += count
            if length:
                return length
            length = int.from_bytes(self._in[:_LENGTH_BYTES], "big")
            if not 0 < length <= RECORD_BYTES:
                raise ProtocolError(f"a record of {length} bytes was announced, the limit is {RECORD_BYTES}")
            wanted = _LENGTH_BYTES + length + _TAG_BYTES

    def _open(self, length: int, into: memoryview) -> None:
        key = self._receive_key
        sealed = self._in[_LENGTH_BYTES : _LENGTH_BYTES + length + _TAG_BYTES]
        try:
            key.cipher.decrypt_into(key.nonce, sealed, bytes(self._in[:_LENGTH_BYTES]), into)
        except InvalidTag as error:
            # The record stays, so that a second try fails as well.
            raise ProtocolError("a record is not as the peer sent it: something on the way changes bytes") from error
        key.used()
        self._arrived = 0


def _texts(buffers: Sequence[memoryview]) -> Iterator[memoryview]:
    """What each record holds. Short buffers together; a long one by itself, so that it can be opened into its place."""
    if len(buffers) > 1 and sum(buffer.nbytes for buffer in buffers) <= _JOINED_BYTES:
        buffers = [memoryview(b"".join(buffers))]
    for buffer in buffers:
        for start in range(0, buffer.nbytes, RECORD_BYTES):
            yield buffer[start : start + RECORD_BYTES]
