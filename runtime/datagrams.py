"""Datagrams that wait in UDP sockets, which CRIU does not dump: what each is, the file that carries them, and the
packets and frames that bring them again. No I/O.

The file lies among CRIU's images, and goes wherever those go.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from runtime.checksum import checksum
from runtime.errors import CorruptData
from runtime.linux.inet_diag import Address

FILE = "datagrams.img"
MAX_DATAGRAMS = 4096
MAX_BYTES = 8 << 20
"""Of their data together. Whoever reads the file holds it in memory."""
MAX_FILE_BYTES = MAX_BYTES + MAX_DATAGRAMS * 64
MAX_DATA_BYTES = 65507
LINK_MTU_BYTES = 1500
"""Of a container's link, which nobody gives another."""

_IP, _IPV6 = b"\x08\x00", b"\x86\xdd"  # linux/if_ether.h
_FRAGMENT_HEADER = 44  # of IPv6 (RFC 8200, section 4.5)
_MORE_FRAGMENTS = 0x2000  # RFC 791, section 3.1
_HOPS = 64
# Locally administered and nobody's: the frame ends at the container, and says nothing to a bridge.
_SENDER = bytes.fromhex("024300000000")


@dataclass(frozen=True, kw_only=True)
class Datagram:
    """Addresses are of one family, IPv4 ones never mapped into IPv6."""

    source: Address
    source_port: int
    destination: Address
    port: int
    data: bytes


def to_file(datagrams: Sequence[Datagram]) -> bytes:
    return bytes(
        msgpack.packb(
            [[one.source.packed, one.source_port, one.destination.packed, one.port, one.data] for one in datagrams]
        )
    )


def from_file(content: bytes) -> list[Datagram]:
    """Raises CorruptData for anything that ``to_file`` would not have made."""
    try:
        found = msgpack.unpackb(content, max_array_len=MAX_DATAGRAMS, max_bin_len=MAX_DATA_BYTES)
        if not isinstance(found, list):
            raise ValueError("not a list")
        return [_read(one) for one in found]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CorruptData(f"{FILE}: {error}") from error


def _read(value: Any) -> Datagram:
    source, source_port, destination, port, data = value
    if not all(isinstance(one, bytes) for one in (source, destination, data)) or len(source) != len(destination):
        raise ValueError("not a datagram")
    if not all(type(number) is int and 0 <= number <= 65535 for number in (source_port, port)):
        raise ValueError("not a port")
    return Datagram(
        source=ipaddress.ip_address(source),
        source_port=source_port,
        destination=ipaddress.ip_address(destination),
        port=port,
        data=data,
    )


def packets(datagram: Datagram, identification: int, mtu_bytes: int) -> list[bytes]:
    """The IP packet that carries it, or its fragments where that is longer. ``identification``, of 16 bits, tells
    fragments of one packet from those of another."""
    source, destination = datagram.source.packed, datagram.destination.packed
    size = 8 + len(datagram.data)
    ports = struct.pack("!HH", datagram.source_port, datagram.port)
    pseudo = source + destination + struct.pack("!II", size, socket.IPPROTO_UDP)
    # 0 would mean that there is none (RFC 768).
    total = checksum(pseudo + ports + struct.pack("!H", size) + datagram.data) or 0xFFFF
    body = ports + struct.pack("!HH", size, total) + datagram.data
    make = _packets4 if datagram.source.version == 4 else _packets6
    return make(source + destination, body, identification, mtu_bytes)


def _packets4(addresses: bytes, body: bytes, identification: int, mtu_bytes: int) -> list[bytes]:
    made = []
    for offset, more, part in _parts(body, mtu_bytes - 20):
        place = offset // 8 | more * _MORE_FRAGMENTS
        start = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(part), identification, place, _HOPS, socket.IPPROTO_UDP)
        made.append(start + struct.pack("!H", checksum(start + addresses)) + addresses + part)
    return made


def _packets6(addresses: bytes, body: bytes, identification: int, mtu_bytes: int) -> list[bytes]:
    if 40 + len(body) <= mtu_bytes:
        return [struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_UDP, _HOPS) + addresses + body]
    made = []
    for offset, more, part in _parts(body, mtu_bytes - 48):
        extension = struct.pack("!BBHI", socket.IPPROTO_UDP, 0, offset | more, identification)
        header = struct.pack("!IHBB", 6 << 28, 8 + len(part), _FRAGMENT_HEADER, _HOPS)
        made.append(header + addresses + extension + part)
    return made


def _parts(body: bytes, room_bytes: int) -> Iterator[tuple[int, bool, bytes]]:
    """Offset, whether more follow, content: all but the last are whole units of eight bytes."""
    step = len(body) if len(body) <= room_bytes else room_bytes // 8 * 8
    for offset in range(0, len(body), step):
        yield offset, offset + step < len(body), body[offset : offset + step]


def frames(datagram: Datagram, mac: bytes, identification: int) -> list[bytes]:
    """Ethernet frames to the container with this MAC, which its link takes as if they came from outside."""
    protocol = _IP if datagram.source.version == 4 else _IPV6
    return [mac + _SENDER + protocol + packet for packet in packets(datagram, identification, LINK_MTU_BYTES)]
