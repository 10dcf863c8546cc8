"""The Internet checksum (RFC 1071), of IP, UDP, ICMPv6."""

from __future__ import annotations

import struct


def checksum(data: bytes) -> int:
    """Of 16 bits, in the order of the network. An odd byte at the end counts as if a zero followed."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
