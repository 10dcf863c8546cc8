"""Whether two hosts' bridges are one segment, and what leads to a container that moves where they are not.

The source asks ``segment`` before anything is offered. The target looks who answers for the container's address on its
own bridge: in a shared segment that is the container itself, which still runs on the source. A wire beside a shared
segment would lead frames in circles, so none is made there, whatever was asked for.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from migrate import messages
from migrate.errors import MoveRefused, PeerFailed
from migrate.fields import Flag, Spec
from migrate.links import Session
from migrate.session import Asked
from runtime.api import ContainerSpec, NetworkSpec
from runtime.errors import BadInput
from runtime.facts_target import AddressProbe
from runtime.host import HostConfig
from runtime.networks import host_for
from runtime.segments import has_other_ports
from runtime.wire import WireSpec
from transport.api import Deadline, Frame

WantedNetwork = Literal["auto", "l2", "forward", "vxlan"]
GRACE_S = 600
"""Long enough for name servers and load balancers to learn where the container is now."""
QUESTION_TIMEOUT_S = 30.0
PROBES, PROBE_S = 5, 0.2
"""The kernel of the other host answers by itself; a frame may be lost."""


@dataclass(frozen=True, kw_only=True)
class Segment(messages.Message):
    """Source asks: is your bridge in the segment of this container? ``alone``: the source's bridge has no port but its
    containers', so it can not be."""

    TYPE: ClassVar[str] = "segment"
    spec: Spec
    alone: Flag = False


@dataclass(frozen=True, kw_only=True)
class InSegment(messages.Message):
    """The answer."""

    TYPE: ClassVar[str] = "in-segment"
    shared: Flag


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the container will be reached: ``network`` l2, forward or vxlan, or empty without a network of its own."""

    network: str = ""
    wire: WireSpec | None = None
    warning: str = ""
    remedy: str = ""


def answer_segment(asked: Asked, message: Mapping[str, Any]) -> None:
    """Handler of "segment". Takes a second where nobody answers and somebody might."""
    question = Segment.parse(message)
    network = question.spec.network
    host = host_for(asked.host, network)
    shared = False
    if network is not None and not question.alone and has_other_ports(host.bridge):
        shared = any(_answers(host.bridge, network) for _attempt in range(PROBES))
    asked.answer(InSegment(shared=shared).to_message())


def _answers(bridge: str, network: NetworkSpec) -> bool:
    """Whether the container itself does. Anybody else who does was preflight's business."""
    with AddressProbe(bridge, network) as probe:
        begin = time.monotonic()
        found = probe.answer(PROBE_S)
        time.sleep(max(0.0, PROBE_S - (time.monotonic() - begin)) if not found else 0.0)
        return found == network.mac.lower()


def find_way(host: HostConfig, spec: ContainerSpec, session: Session, wanted: WantedNetwork, grace_s: int) -> Way:
    """Ask the target, and decide. Raises MoveRefused for a wire beside a shared segment, BadInput, TransportError."""
    network = spec.network
    if network is None:
        return Way()
    shared = _ask(host, spec, session)
    if shared is None:
        if wanted in ("forward", "vxlan"):
            raise MoveRefused(
                f"{session.entry.name} has a version that knows no --network {wanted}",
                hint="install the same version on both hosts",
            )
        return Way(network="l2")
    return decide(wanted, shared, session.entry.name, lambda: _wire(session, grace_s if wanted != "vxlan" else 0))


def decide(wanted: WantedNetwork, shared: bool, target: str, wire: Any) -> Way:
    """``wire`` makes a WireSpec. Raises MoveRefused."""
    if shared and wanted in ("forward", "vxlan"):
        raise MoveRefused(
            "the bridges of both hosts are one segment: a wire beside it would lead frames in circles",
            hint="move with --network l2, or auto",
        )
    if shared:
        return Way(network="l2")
    if wanted == "l2":
        return Way(
            network="l2",
            warning=f"{target} is not in the segment of this host's containers: connections will not go on",
            remedy="--network forward leads them to the target",
        )
    return Way(network="vxlan" if wanted == "vxlan" else "forward", wire=wire())


def _ask(host: HostConfig, spec: ContainerSpec, session: Session) -> bool | None:
    """None: the target does not know the question."""
    deadline = Deadline.after(QUESTION_TIMEOUT_S)
    alone = not has_other_ports(host_for(host, spec.network).bridge)
    session.channel.send(Frame.control(Segment(spec=spec, alone=alone).to_message()), deadline=deadline)
    try:
        return InSegment.parse(session.channel.receive(deadline=deadline).message()).shared
    except PeerFailed as error:
        if error.code == "unknown-message":
            return None
        raise


def _wire(session: Session, grace_s: int) -> WireSpec:
    """Between the addresses by which the hosts talk to each other."""
    entry = session.entry
    name, port = (entry.stream_host, entry.stream_port) if session.transport == "stream" else ("", 0)
    if not name:
        name, port = entry.ssh_host, entry.ssh_port
    try:
        family, kind, _protocol, _name, address = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            here = str(probe.getsockname()[0])
    except OSError as error:
        raise BadInput(f"no way to {name}: {error}", hint="cmigrate host test") from error
    return WireSpec(number=secrets.randbelow(2**24 - 1) + 1, source=here, target=str(address[0]), grace_s=grace_s)
