"""User-defined networks: a bridge of its own on each host, under one name, for containers that belong together.

``networks/NAME.json`` of the state directory says that a host has one. A container carries all that a bridge needs in
its own NetworkSpec, so ``host_for`` asks no file: the host's settings, as a container of that network sees them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.address import subnet_of
from runtime.api import NAME_PATTERN, ContainerSpec, NetworkSpec
from runtime.errors import BadInput, CorruptData, NameTaken, NoRoom, NotFound, WrongState
from runtime.host import HostConfig
from runtime.store import naming, read_json, write_durably

RESERVED = ("bridge", "none", "host")
BRIDGE_PATTERN = re.compile(r"cmn[0-9a-f]{8}")
_OWN_SUBNETS = ipaddress.IPv4Network("10.89.0.0/16")
"""Where subnets that nobody gave are taken from, 256 addresses each."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """``subnet`` and ``gateway`` (the bridge's own address) must be the same on every host that has it."""

    name: str
    subnet: str
    gateway: str
    bridge: str
    created_at: str = ""


def bridge_of(name: str) -> str:
    """The same on every host."""
    return f"cmn{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def host_for(host: HostConfig, network: NetworkSpec | None) -> HostConfig:
    """The settings that count for a container of this network: those of its bridge, where it has one of its own."""
    if network is None or not network.name:
        return host
    subnet = str(ipaddress.IPv4Interface(network.address).network)
    return _with_bridge(host, network.name, subnet, network.gateway)


def _with_bridge(host: HostConfig, name: str, subnet: str, gateway: str) -> HostConfig:
    return replace(host, bridge=bridge_of(name), subnet=subnet, gateway=gateway, bridge_address="", gateway6="")


class Networks:
    """Of this host. Bridges are made and removed by the caller (network.ensure_bridge, network.remove_bridge)."""

    def __init__(self, host: HostConfig) -> None:
        self._host = host
        self._directory = host.state_dir / "networks"

    def create(self, name: str, *, subnet: str = "", gateway: str = "", created_at: str = "") -> Network:
        """Raises BadInput for what is no name, subnet or gateway or overlaps another network, NameTaken, NoRoom."""
        if name in RESERVED or not NAME_PATTERN.fullmatch(name):
            raise BadInput(f"{name!r} is no name for a network", hint="letters, digits, _ . and -; not bridge or none")
        if any(known.name == name for known in self.list()):
            raise NameTaken(f"there is a network {name} already", hint=f"cmigrate network inspect {name}")
        chosen = self._checked(subnet) if subnet else self._free()
        network = Network(
            name=name,
            subnet=str(chosen),
            gateway=_gateway(gateway, chosen),
            bridge=bridge_of(name),
            created_at=created_at,
        )
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(self._directory / f"{name}.json", json.dumps(dataclasses.asdict(network)).encode())
        return network

    def _taken(self) -> list[ipaddress.IPv4Network]:
        return [subnet_of(self._host), *(ipaddress.IPv4Network(known.subnet) for known in self.list())]

    def _checked(self, text: str) -> ipaddress.IPv4Network:
        try:
            chosen = ipaddress.IPv4Network(text)
        except ValueError as error:
            raise BadInput(f"--subnet {text}: {error}", hint="such as 10.89.7.0/24") from error
        if chosen.num_addresses < 8:
            raise BadInput(f"--subnet {text} has room for no containers", hint="such as 10.89.7.0/24")
        for other in self._taken():
            if chosen.overlaps(other):
                raise BadInput(f"--subnet {text} overlaps {other}", hint="cmigrate network ls shows all")
        return chosen

    def _free(self) -> ipaddress.IPv4Network:
        taken = self._taken()
        for candidate in _OWN_SUBNETS.subnets(new_prefix=24):
            if not any(candidate.overlaps(other) for other in taken):
                return candidate
        raise NoRoom(f"no free subnet in {_OWN_SUBNETS}", hint="give one: --subnet")

    def list(self) -> list[Network]:
        """By name. Raises CorruptData."""
        if not self._directory.exists():
            return []
        return [self._read(file.stem) for file in sorted(self._directory.glob("*.json"))]

    def get(self, name: str) -> Network:
        """Raises NotFound."""
        if not NAME_PATTERN.fullmatch(name) or not (self._directory / f"{name}.json").exists():
            raise NotFound(f"there is no network {name}", hint=f"cmigrate network create {name}")
        return self._read(name)

    def _read(self, name: str) -> Network:
        file = self._directory / f"{name}.json"
        with naming(file):
            return _network(read_json(file))

    def host_of(self, name: str) -> HostConfig:
        """This host's settings for containers of that network. Raises NotFound."""
        network = self.get(name)
        return _with_bridge(self._host, name, network.subnet, network.gateway)

    def remove(self, name: str, specs: Sequence[ContainerSpec]) -> Network:
        """``specs`` are those of all containers known here. Raises NotFound, WrongState while one belongs to it."""
        network = self.get(name)
        members = [spec.name for spec in specs if spec.network is not None and spec.network.name == name]
        if members:
            raise WrongState(f"network {name} has containers: {', '.join(members)}", hint="remove them first")
        (self._directory / f"{name}.json").unlink()
        return network


def _gateway(wanted: str, subnet: ipaddress.IPv4Network) -> str:
    try:
        gateway = ipaddress.IPv4Address(wanted) if wanted else subnet[1]
    except ValueError as error:
        raise BadInput(f"--gateway {wanted}: {error}", hint=f"an address of {subnet}") from error
    if gateway not in subnet or gateway in (subnet.network_address, subnet.broadcast_address):
        raise BadInput(f"--gateway {wanted} is no host's address in {subnet}", hint=f"such as {subnet[1]}")
    return str(gateway)


def _network(data: Mapping[str, Any]) -> Network:
    fields = {key: data.get(key, "") for key in Network.__dataclass_fields__}
    if not all(isinstance(value, str) for value in fields.values()):
        raise CorruptData("a network's record does not fit")
    return Network(**fields)


def network_mismatch(host: HostConfig, wanted: NetworkSpec | None) -> str:
    """Why a container of this network can not come here; empty when it can, or when the network is no user's."""
    if wanted is None or not wanted.name:
        return ""
    try:
        found = Networks(host).get(wanted.name)
    except NotFound as error:
        return error.what
    subnet = str(ipaddress.IPv4Interface(wanted.address).network)
    if (found.subnet, found.gateway) != (subnet, wanted.gateway):
        return f"network {wanted.name} is {found.subnet} with gateway {found.gateway} there, and not {subnet}"
    return ""
