"""What a container says of itself to its neighbours: gratuitous ARP, neighbour advertisements. No I/O."""

from __future__ import annotations

import ipaddress
import struct

from runtime.address import host_address
from runtime.api import NetworkSpec
from runtime.checksum import checksum
from runtime.errors import BadInput

# linux/if_ether.h, linux/if_arp.h, linux/icmpv6.h, linux/in6.h
ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD
ARPOP_REQUEST = 1
_ICMPV6, _ADVERTISEMENT, _OVERRIDE, _TARGET_LINK_ADDRESS = 58, 136, 0x20000000, 2
_ALL_NODES = ipaddress.IPv6Address("ff02::1").packed
_ALL_NODES_MAC = bytes.fromhex("333300000001")


def announcements(network: NetworkSpec) -> tuple[bytes, ...]:
    """One Ethernet frame for each of the container's addresses. Raises BadInput."""
    arp = gratuitous_arp(network)
    return (arp, neighbour_advertisement(network)) if network.address6 else (arp,)


def protocol_of(frame: bytes) -> int:
    return int.from_bytes(frame[12:14], "big")


def _mac(network: NetworkSpec) -> bytes:
    try:
        mac = bytes.fromhex(network.mac.replace(":", ""))
        ipaddress.IPv4Address(network.gateway)
    except ValueError as error:
        raise BadInput(f"network of the container: {error}") from error
    if len(mac) != 6:
        raise BadInput(f"{network.mac!r} is no MAC address")
    return mac


def gratuitous_arp(network: NetworkSpec) -> bytes:
    """An ARP announcement (RFC 5227, section 3): sender and target address are the container's. Raises BadInput."""
    address, mac = ipaddress.IPv4Address(host_address(network)).packed, _mac(network)
    ethernet = b"\xff" * 6 + mac + struct.pack("!H", ETH_P_ARP)
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, ARPOP_REQUEST) + mac + address + b"\0" * 6 + address
    return ethernet + arp


def neighbour_advertisement(network: NetworkSpec) -> bytes:
    """To all nodes, overriding what they know (RFC 4861, section 7.2.6). Raises BadInput."""
    mac, address = _mac(network), ipv6_interface(network.address6).packed
    body = struct.pack("!BBHI", _ADVERTISEMENT, 0, 0, _OVERRIDE) + address
    body += struct.pack("!BB", _TARGET_LINK_ADDRESS, 1) + mac
    pseudo = address + _ALL_NODES + struct.pack("!II", len(body), _ICMPV6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    header = struct.pack("!IHBB", 6 << 28, len(body), _ICMPV6, 255) + address + _ALL_NODES
    return _ALL_NODES_MAC + mac + struct.pack("!H", ETH_P_IPV6) + header + body


def solicited_mac(network: NetworkSpec) -> bytes:
    """Where neighbours' questions for the container's IPv6 address are sent (RFC 2464, section 7); empty without."""
    return b"\x33\x33\xff" + ipv6_interface(network.address6).packed[-3:] if network.address6 else b""


def ipv6_interface(text: str) -> ipaddress.IPv6Interface:
    """Raises BadInput."""
    try:
        return ipaddress.IPv6Interface(text)
    except ValueError as error:
        raise BadInput(f"{text!r} is no IPv6 address with a prefix length") from error


def is_for(frame: bytes, mac: bytes, solicited: bytes) -> bool:
    """Whether a frame that was held is the container's: its own, questions for its addresses, broadcast ARP."""
    if frame[:6] == mac or (solicited and frame[:6] == solicited):
        return True
    return frame[:6] == b"\xff" * 6 and protocol_of(frame) == ETH_P_ARP
