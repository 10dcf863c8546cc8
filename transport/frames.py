"""The form of frames on the wire, without any I/O.

    offset  size  field
    0       4     magic "CMG1"
    4       1     kind (FrameKind)
    5       1     flags, 0
    6       2     reserved, 0
    8       4     length of the body
    12      8     tag
    20      4     CRC-32 (zlib) of the 20 bytes before

All numbers are big-endian and unsigned. The check sum finds a reader that lost its place; integrity of bodies against
an attacker is the business of TLS and SSH below.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from transport.api import (
    MAX_BODY_BYTES,
    MAX_CONTROL_BYTES,
    MAX_TAG,
    Buffer,
    Frame,
    FrameKind,
    Into,
    ProtocolError,
)

MAGIC = b"CMG1"
HEADER_BYTES = 24
_FIELDS = struct.Struct(">4sBBHIQ")
_CHECK = struct.Struct(">I")
_LIMITS = {FrameKind.CONTROL: MAX_CONTROL_BYTES, FrameKind.DATA: MAX_BODY_BYTES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    kind: FrameKind
    tag: int
    length: int


def encode_header(kind: FrameKind, tag: int, length: int) -> bytes:
    """The header of a frame; raises ProtocolError for one that the other side would refuse."""
    if not 0 <= tag <= MAX_TAG:
        raise ProtocolError(f"tag {tag} does not fit into 64 bits")
    _check_length(kind, length)
    fields = _FIELDS.pack(MAGIC, kind, 0, 0, length, tag)
    return fields + _CHECK.pack(zlib.crc32(fields))


def decode_header(raw: Buffer) -> Header:
    """Check and read HEADER_BYTES bytes from the peer; raises ProtocolError unless every field is as we write it."""
    fields = bytes(raw[: _FIELDS.size])
    magic, kind, flags, reserved, length, tag = _FIELDS.unpack(fields)
    if magic != MAGIC:
        # What another program says first (an SSH banner, an HTTP answer, a shell's greeting) names the mistake best.
        raise ProtocolError(
            f"the peer does not speak this protocol: it sent {fields!r}",
            hint="the login shell of the peer must print nothing, and the port must belong to cmigrate",
        )
    if _CHECK.unpack(bytes(raw[_FIELDS.size : HEADER_BYTES]))[0] != zlib.crc32(fields):
        raise ProtocolError("the check sum of a frame header is wrong")
    if flags or reserved:
        raise ProtocolError(f"a frame header uses flags {flags} and reserved {reserved}, unknown to this version")
    try:
        known = FrameKind(kind)
    except ValueError:
        raise ProtocolError(f"frame kind {kind} is unknown to this version") from None
    _check_length(known, length)
    return Header(kind=known, tag=tag, length=length)


def _check_length(kind: FrameKind, length: int) -> None:
    limit = _LIMITS[kind]
    if length > limit:
        raise ProtocolError(f"a {kind.name} frame of {length} bytes is longer than the limit of {limit}")


class Decoder:
    """Turns a stream of bytes into frames, reading bodies to where they belong.

    The caller asks `want` where the next bytes go, puts some there and says how many with `got`. Memory for a body is
    taken only after its header has been checked. After a ProtocolError the decoder is of no more use.
    """

    def __init__(self) -> None:
        self._header_bytes = bytearray(HEADER_BYTES)
        self._header: Header | None = None
        self._body: Buffer | None = None
        self._target = memoryview(self._header_bytes)
        self._filled = 0

    @property
    def position(self) -> str:
        """Where in a frame the stream stands, for messages; "" between two frames."""
        if self._header is not None:
            return f"after {self._filled} of {self._header.length} bytes of a frame's body"
        return f"after {self._filled} of {HEADER_BYTES} bytes of a frame's header" if self._filled else ""

    def want(self, into: Into | None = None) -> memoryview:
        """The memory, never empty, that the next bytes of the stream belong to."""
        if self._header is not None and self._body is None:
            self._body = self._place(self._header, into)
            self._target = memoryview(self._body).cast("B")
        return self._target[self._filled :]

    def got(self, count: int) -> Frame | None:
        """`count` bytes were put at the start of what `want` gave. Returns the frame that they complete, if any."""
        self._filled += count
        if self._filled < len(self._target):
            return None
        if self._header is None:
            self._header = decode_header(self._header_bytes)
            self._filled = 0
            return None if self._header.length else self._finish(b"")
        assert self._body is not None
        return self._finish(self._body)

    def feed(self, data: Buffer) -> list[Frame]:
        """Frames completed by `data`, for callers that already hold the bytes."""
        frames = []
        rest = memoryview(data).cast("B")
        while rest:
            target = self.want()
            part = rest[: len(target)]
            target[: len(part)] = part
            rest = rest[len(part) :]
            frame = self.got(len(part))
            if frame is not None:
                frames.append(frame)
        return frames

    def _place(self, header: Header, into: Into | None) -> Buffer:
        if header.kind is FrameKind.DATA and into is not None:
            place = into(header.tag, header.length)
            if place is not None:
                if place.nbytes != header.length or place.readonly:
                    raise ValueError(f"memory for a body must be writable and {header.length} bytes long")
                return place
        return bytearray(header.length)

    def _finish(self, body: Buffer) -> Frame:
        assert self._header is not None
        frame = Frame(self._header.kind, self._header.tag, body)
        self._header = self._body = None
        self._target = memoryview(self._header_bytes)
        self._filled = 0
        return frame
