"""The vocabulary of this package: frames, deadlines, channels, and what can go wrong with them.

TransportError
|-- ConnectFailed          nobody answered, or what answered is not what we look for
|-- AuthenticationFailed   wrong host key, unknown or wrong certificate, refused key
|-- ChannelClosed          the peer went away, or this side closed or aborted the channel
|-- DeadlineExpired        the time the caller gave is over
`-- ProtocolError          bytes that are not ours, or a frame beyond the limits
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Literal, Protocol, Self, TypeAlias

import msgpack

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Longest body of a DATA frame: large enough that a header costs nothing, small enough to wait for in a blackout."""

MAX_CONTROL_BYTES = 1024 * 1024
"""Longest body of a CONTROL frame."""

MAX_TAG = 2**64 - 1

Buffer: TypeAlias = bytes | bytearray | memoryview

Into: TypeAlias = Callable[[int, int], memoryview | None]
"""Called with (tag, length) of a DATA frame; returns the writable memory, exactly that long, that its body goes to,
or None to have it allocated."""


class TransportError(Exception):
    """Base of all errors here. `what` happened, and a `hint` what to do next ("" when there is none)."""

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} ({self.hint})" if self.hint else self.what


class ConnectFailed(TransportError):
    """No connection came about."""


class AuthenticationFailed(TransportError):
    """One side did not accept who the other is."""


class ChannelClosed(TransportError):
    """The channel is gone: the peer went away, or this side closed or aborted it."""


class DeadlineExpired(TransportError):
    """The caller's deadline passed before the call could finish."""


class ProtocolError(TransportError):
    """What came, or what should be sent, is not a valid frame."""


class FrameKind(IntEnum):
    CONTROL = 1
    """The body is one msgpack map with string keys."""
    DATA = 2
    """The body is raw bytes."""


def _string_map(pairs: list[tuple[object, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError(f"a key is {type(key).__name__}, not a string")
        if key in result:
            raise ValueError(f"key {key!r} is there twice")
        result[key] = value
    return result


def _no_extension(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code} is not used here")


@dataclass(frozen=True, slots=True)
class Frame:
    """One unit on a channel. `tag` is an unsigned 64-bit number whose meaning belongs to the layer above."""

    kind: FrameKind
    tag: int
    body: Buffer

    @classmethod
    def control(cls, message: Mapping[str, object], *, tag: int = 0) -> Frame:
        """A CONTROL frame of `message`, whose values must be what msgpack knows (no extension types)."""
        return cls(FrameKind.CONTROL, tag, msgpack.packb(dict(message)))

    @classmethod
    def data(cls, tag: int, body: Buffer) -> Frame:
        return cls(FrameKind.DATA, tag, body)

    def message(self) -> dict[str, object]:
        """The map in a CONTROL frame. Raises ProtocolError for anything but one map whose keys, at every depth, are
        strings and there once; the body comes from the peer and is not trusted."""
        if self.kind is not FrameKind.CONTROL:
            raise ProtocolError(f"a control message was expected, and a {self.kind.name} frame came")
        try:
            message = msgpack.unpackb(self.body, object_pairs_hook=_string_map, ext_hook=_no_extension)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ProtocolError(f"a control frame is not a valid message: {error or type(error).__name__}") from error
        if not isinstance(message, dict):
            raise ProtocolError(f"a control frame holds {type(message).__name__} instead of a map")
        return message


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on this host's monotonic clock, or never. Made once, passed down through every call."""

    at_s: float | None

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    @classmethod
    def never(cls) -> Deadline:
        return cls(None)

    def within(self, seconds: float) -> Deadline:
        """This deadline, or `seconds` from now if that is sooner."""
        soon = time.monotonic() + seconds
        return self if self.at_s is not None and self.at_s <= soon else Deadline(soon)

    def remaining(self) -> float | None:
        """Seconds left, not below 0; None when there is no end."""
        return None if self.at_s is None else max(0.0, self.at_s - time.monotonic())

    def expired(self) -> bool:
        return self.at_s is not None and time.monotonic() >= self.at_s


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Who is at the other end, for people and logs; `name` is what the connector or the certificate says."""

    name: str
    transport: Literal["ssh", "stream", "local", "memory"]
    detail: str


class Channel(Protocol):
    """Frames in order, both ways, to one peer.

    One thread may receive while others send; calls of one direction wait for each other, within their deadline.
    Data sent before `close` arrives, unless the connection breaks. A frame is delivered whole or not at all.
    """

    @property
    def peer(self) -> Peer: ...

    @property
    def bytes_sent(self) -> int:
        """Bytes of whole frames sent, headers included, before encryption."""
        ...

    @property
    def bytes_received(self) -> int:
        """Bytes received, headers included, after decryption."""
        ...

    def send(self, frame: Frame, *, deadline: Deadline) -> None:
        """Hand one frame over to the system. Raises ProtocolError, with nothing sent, for a frame beyond the limits;
        ChannelClosed; DeadlineExpired, after which part of the frame may be out and nothing can be sent any more."""
        ...

    def send_data(self, tag: int, buffers: Sequence[Buffer], *, deadline: Deadline) -> None:
        """Send one DATA frame whose body is these buffers one after the other, without joining them first where the
        system can do that. Otherwise as `send`."""
        ...

    def receive(self, *, deadline: Deadline, into: Into | None = None) -> Frame:
        """The next frame. Raises ChannelClosed at the end; ProtocolError for garbage, then for good; DeadlineExpired,
        after which the call may be repeated: what has arrived of a frame is kept.

        With `into`, bodies of DATA frames are read straight into the memory it names, and `frame.body` is that
        memory. An exception from `into` comes through, and the frame stays to be received."""
        ...

    def readable(self, timeout_s: float) -> bool:
        """Whether `receive` has something to do (a frame, part of one, or the end) within so many seconds."""
        ...

    def abort(self) -> None:
        """Cut the connection from any thread or signal handler: calls blocked here raise ChannelClosed. The peer
        notices, at the latest when `close` follows. May be called at any time and more than once."""
        ...

    def close(self) -> None:
        """End the connection and give everything back that belongs to it. Safe to repeat. Not for signal handlers."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Connector(Protocol):
    """Knows how to reach one peer."""

    def connect(self, *, deadline: Deadline) -> Channel:
        """Raises ConnectFailed, AuthenticationFailed, DeadlineExpired or ProtocolError; then nothing is left open."""
        ...
