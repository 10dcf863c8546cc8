"""An open channel goes from one process of this host to another: its descriptors and what its cipher stands at.

Between two frames that is all there is to it, and the peer sees nothing of it. Both ends of a connection of this
host's own (a unix socket) use the two functions here; who hands over must not use the channel any more.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack

from transport.api import Channel, ChannelClosed, Peer, ProtocolError
from transport.channel import StreamChannel
from transport.sealed import SealedStream
from transport.streams import FdStream

MAX_NOTE_BYTES = 1 << 16
_DESCRIPTORS = 3


def send_note(sock: socket.socket, note: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """One map, with descriptors if there are any. Raises OSError."""
    body = msgpack.packb(dict(note))
    socket.send_fds(sock, [len(body).to_bytes(4, "big") + body], list(descriptors))


def receive_note(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What ``send_note`` sent; the descriptors are the caller's. Raises ChannelClosed at the end, OSError, and
    ProtocolError for anything else."""
    data, descriptors, _flags, _address = socket.recv_fds(
        sock, MAX_NOTE_BYTES, _DESCRIPTORS, flags=socket.MSG_CMSG_CLOEXEC
    )
    try:
        while data and (len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big")):
            more = sock.recv(MAX_NOTE_BYTES)
            data = data + more if more and len(data) < MAX_NOTE_BYTES else b""
        if not data:
            raise ChannelClosed("the other process is gone")
        note = msgpack.unpackb(data[4:])
        if not isinstance(note, dict):
            raise ProtocolError("a note from another process is no map")
    except (ValueError, msgpack.UnpackException) as error:
        _close(descriptors)
        raise ProtocolError(f"a note from another process can not be read: {error}") from error
    except BaseException:
        _close(descriptors)
        raise
    return note, list(descriptors)


def standing_of(channel: Channel) -> tuple[dict[str, Any], list[int]] | None:
    """What ``taken_over`` needs, and the descriptors; None for a channel that can not be handed over: one whose TLS
    session lives in this process, or with something half read."""
    if not isinstance(channel, StreamChannel) or not channel.between_frames:
        return None
    stream = channel.stream
    peer = {"name": channel.peer.name, "transport": channel.peer.transport, "detail": channel.peer.detail}
    if isinstance(stream, SealedStream):
        cipher = stream.standing()
        return None if cipher is None else ({"peer": peer, "cipher": cipher}, [stream.descriptors[0]])
    if type(stream) is FdStream:
        return {"peer": peer}, list(stream.descriptors)
    return None


def taken_over(standing: Mapping[str, Any], descriptors: Sequence[int]) -> Channel:
    """The channel, in this process. Takes the descriptors, whatever happens. Raises ProtocolError."""
    try:
        peer = Peer(**standing["peer"])
        if "cipher" in standing:
            (descriptor,) = descriptors
            return StreamChannel(SealedStream.going_on(socket.socket(fileno=descriptor), standing["cipher"]), peer)
        read_fd, write_fd = descriptors
    except (KeyError, TypeError, ValueError, OSError) as error:
        _close(descriptors)
        raise ProtocolError(f"a channel can not be taken over: {error!r}") from error
    return StreamChannel(FdStream(read_fd, write_fd), peer)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
