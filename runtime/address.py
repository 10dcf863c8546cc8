"""Addresses of containers: chosen from the host's subnet, checked when the operator or a peer names one. No I/O."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import replace

from runtime.api import NetworkSpec
from runtime.errors import BadInput, NoRoom
from runtime.host import HostConfig

# The last addresses of a subnet stay free for hosts: at most so many, and at most this part of a small subnet.
HOST_ADDRESSES = 256
HOST_PART = 8


def mac_for(address: str) -> str:
    """Locally administered, made from the address: it moves with the container and meets no other."""
    packed = ipaddress.ip_interface(address).ip.packed[-4:]
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *packed))


def host_address(network: NetworkSpec) -> str:
    """The address without its prefix length, in its one spelling. Raises BadInput for anything else."""
    try:
        return str(ipaddress.IPv4Interface(network.address).ip)
    except ValueError as error:
        raise BadInput(f"{network.address!r} is no IPv4 address with a prefix length") from error


def subnet_of(host: HostConfig) -> ipaddress.IPv4Network:
    """Raises BadInput naming the configuration's key."""
    try:
        return ipaddress.IPv4Network(host.subnet)
    except ValueError as error:
        raise BadInput(f"subnet in {host.config_dir}/config.toml: {error}", hint='such as "10.88.0.0/16"') from error


def allocate_address(host: HostConfig, container_id: str, used: Iterable[str], wanted: str = "") -> NetworkSpec:
    """``wanted`` (with or without prefix length), or one made from the id: two hosts seldom choose alike.

    ``used`` are addresses of containers known here. Raises BadInput for a wanted one that does not fit, NoRoom.
    """
    subnet = subnet_of(host)
    taken = _reserved(host, subnet) | {ipaddress.ip_interface(address).ip for address in used}
    chosen = _checked(wanted, subnet, taken) if wanted else _free(container_id, subnet, taken)
    address = f"{chosen}/{subnet.prefixlen}"
    return NetworkSpec(address=address, mac=mac_for(address), gateway=host.gateway)


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _reserved(host: HostConfig, subnet: ipaddress.IPv4Network) -> set[_Address]:
    own = [host.gateway, *([host.bridge_address.partition("/")[0]] if host.bridge_address else [])]
    try:
        return {subnet.network_address, subnet.broadcast_address, *map(ipaddress.IPv4Address, own)}
    except ValueError as error:
        raise BadInput(f"gateway or bridge_address in {host.config_dir}/config.toml: {error}") from error


def _checked(wanted: str, subnet: ipaddress.IPv4Network, taken: set[_Address]) -> ipaddress.IPv4Address:
    try:
        chosen = ipaddress.IPv4Interface(wanted).ip
    except ValueError as error:
        raise BadInput(f"--ip {wanted}: {error}", hint=f"an address of {subnet}") from error
    if chosen not in subnet:
        raise BadInput(f"--ip {wanted} is not in {subnet}", hint="subnet is set in config.toml")
    if chosen in taken:
        raise BadInput(f"--ip {wanted} is taken", hint="leave --ip out to get a free one")
    return chosen


def with_ipv6(network: NetworkSpec, host: HostConfig, wanted: str, used: Iterable[str]) -> NetworkSpec:
    """The same with an IPv6 address (prefix length 64 where none is given) and the host's IPv6 gateway as way out, if
    that is in the same network. Raises BadInput."""
    hint = "an address for containers, such as fd00:88::5/64"
    try:
        interface = ipaddress.IPv6Interface(wanted if "/" in wanted else f"{wanted}/64")
        gateway = ipaddress.IPv6Interface(host.gateway6).ip if host.gateway6 else None
        taken = {ipaddress.IPv6Interface(address).ip for address in used if address}
    except ValueError as error:
        raise BadInput(f"--ip6 {wanted}: {error}", hint=hint) from error
    address = interface.ip
    if address.is_link_local or address.is_multicast or address.is_loopback or address.is_unspecified:
        raise BadInput(f"--ip6 {wanted} can not be a container's", hint=hint)
    if address in taken or address == gateway:
        raise BadInput(f"--ip6 {wanted} is taken", hint="give another one")
    way_out = str(gateway) if gateway is not None and gateway in interface.network else ""
    return replace(network, address6=str(interface), gateway6=way_out)


def _free(container_id: str, subnet: ipaddress.IPv4Network, taken: set[_Address]) -> ipaddress.IPv4Address:
    start = int.from_bytes(hashlib.sha256(container_id.encode()).digest()[:4], "big")
    span = subnet.num_addresses - min(HOST_ADDRESSES, subnet.num_addresses // HOST_PART)
    candidates = (subnet.network_address + (start + step) % span for step in range(span))
    found = next((address for address in candidates if address not in taken), None)
    if found is None:
        raise NoRoom(f"no free address in {subnet}", hint="remove containers, or set a larger subnet in config.toml")
    return found
