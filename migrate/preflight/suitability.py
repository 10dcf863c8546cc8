"""The judgement over a target: what the container needs against what the host has. Pure, one function a question."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from migrate.preflight.findings import Finding, blocker, named, ok, size, warning
from migrate.preflight.source import SLACK_BYTES
from migrate.preflight.support import judge_kernel
from migrate.preflight.wireform import SourceFacts
from runtime.api import NetworkSpec, PortMapping
from runtime.criu.features import CriuFeatures
from runtime.facts import LowerFile
from runtime.facts_host import KernelSupport, Room
from runtime.host import HostConfig
from runtime.networks import host_for

CLOCK_TOLERANCE_S = 5
"""Two hosts' wall clocks, and the way of a message between them."""
MAX_FLAGS = 12


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A container of the target, or one ``arriving``; ``ports`` are those it publishes now."""

    id: str
    name: str
    network: NetworkSpec | None
    ports: tuple[PortMapping, ...] = ()
    arriving: bool = False


@dataclass(frozen=True, kw_only=True)
class TargetView:
    """The target host. ``cpu_error`` is CRIU's objection to the source's CPU, empty for none.

    ``files`` has an entry for each path asked for. ``address_at`` is the MAC that answers for the container's address.
    """

    host: HostConfig
    arch: str
    page_bytes: int
    clock_s: int
    criu: CriuFeatures | None
    criu_error: str
    criu_hint: str
    cpu_error: str
    cpu_flags: tuple[str, ...]
    has_ipv6: bool
    kernel: KernelSupport
    room: Room
    holders: tuple[Holder, ...]
    bound_ports: Mapping[str, frozenset[int]]
    rootfs_exists: bool
    missing_volumes: tuple[str, ...]
    files: Mapping[str, LowerFile | None]
    network_mismatch: str = ""
    address_at: str = ""

    def with_address_at(self, mac: str) -> TargetView:
        return dataclasses.replace(self, address_at=mac)


Check = Callable[[SourceFacts, TargetView, str], Iterator[Finding]]


def judge_target(wanted: SourceFacts, view: TargetView, mode: str) -> list[Finding]:
    """All findings of all checks; a check that finds nothing is one ``ok``."""
    found: list[Finding] = []
    for name, check, text in CHECKS:
        findings = list(check(wanted, view, mode))
        found += findings or [ok(name, text)]
    return found


def _machine(wanted: SourceFacts, view: TargetView, _mode: str) -> Iterator[Finding]:
    if wanted.arch != view.arch:
        yield blocker(
            "arch", f"the source is {wanted.arch}, {view.host.name} is {view.arch}", "choose a host of the same kind"
        )
    elif wanted.page_bytes != view.page_bytes:
        yield blocker(
            "arch",
            f"memory pages are {wanted.page_bytes} bytes on the source, {view.page_bytes} on {view.host.name}",
            "choose a host whose kernel has the same page size",
        )


def _criu(wanted: SourceFacts, view: TargetView, _mode: str) -> Iterator[Finding]:
    if view.criu is None:
        yield blocker(
            "criu",
            f"CRIU does not work on {view.host.name}: {view.criu_error}",
            view.criu_hint or "run scripts/setup there",
        )
        return
    if view.criu.check_error:
        yield blocker(
            "criu", f"CRIU's own check fails on {view.host.name}: {view.criu.check_error}", "run cmigrate doctor there"
        )
    # CRIU reads the images of older versions; nobody promises the reverse, and 4.2 did change its page maps.
    if view.criu.version[:2] < wanted.criu_version[:2]:
        theirs = ".".join(str(part) for part in wanted.criu_version)
        yield blocker(
            "criu-version",
            f"CRIU is {view.criu.version_text} on {view.host.name} and {theirs} on the source: "
            "older ones may not read newer images",
            "run scripts/setup on both hosts, so that both have the newer CRIU",
        )
    if "timens" in view.criu.missing:
        yield warning("time-namespace", f"no time namespaces on {view.host.name}: monotonic clocks will jump")


def _cpu(wanted: SourceFacts, view: TargetView, _mode: str) -> Iterator[Finding]:
    if wanted.arch != view.arch:
        return
    missing = [flag for flag in wanted.cpu_flags if flag not in view.cpu_flags]
    text = f"; it lacks {named(missing, MAX_FLAGS)}" if missing else ""
    remedy = "choose a host whose CPU can all the source's can, or give both the same CPU model in their hypervisor"
    if view.cpu_error:
        yield blocker("cpu", f"the CPU of {view.host.name} does not fit: {view.cpu_error}{text}", remedy)
    elif missing and (not wanted.cpuinfo or view.criu is None or not view.criu.cpuinfo):
        # CRIU describes no CPUs on this architecture: the kernel's list is all there is.
        yield blocker("cpu", f"the CPU of {view.host.name} lacks {named(missing, MAX_FLAGS)}", remedy)


def _features(wanted: SourceFacts, view: TargetView, _mode: str) -> Iterator[Finding]:
    for finding in judge_kernel(view.kernel):
        if finding.level == "blocker":
            yield dataclasses.replace(finding, what=f"{view.host.name}: {finding.what}")
    if "compat_cr" in wanted.needs and view.criu is not None and "compat_cr" in view.criu.missing:
        yield blocker(
            "32-bit",
            f"the container runs 32-bit programs, which CRIU cannot restore on {view.host.name}",
            "use 64-bit ones",
        )
    if "ipv6" in wanted.needs and not view.has_ipv6:
        yield blocker(
            "ipv6", f"the container has IPv6 sockets, and {view.host.name} has no IPv6", "boot without ipv6.disable=1"
        )


def _room(wanted: SourceFacts, view: TargetView, mode: str) -> Iterator[Finding]:
    memory = wanted.memory_bytes + wanted.tmpfs_bytes + SLACK_BYTES
    if memory > view.room.memory_bytes:
        yield blocker(
            "memory",
            f"the container needs {size(memory)} of memory, {view.host.name} has {size(view.room.memory_bytes)} free",
            "stop something there, or choose a larger host",
        )
    disk = wanted.upper_bytes + SLACK_BYTES + (wanted.memory_bytes if mode == "stopcopy" else 0)
    if disk > view.room.state_bytes:
        yield blocker(
            "disk",
            f"the container needs {size(disk)} in {view.host.state_dir} of {view.host.name}, "
            f"{size(view.room.state_bytes)} are free",
            "free space there" + (", or move with --mode diskless" if mode == "stopcopy" else ""),
        )
    if wanted.hugetlb_bytes > view.room.huge_page_bytes:
        yield blocker(
            "huge-pages",
            f"the container needs {size(wanted.hugetlb_bytes)} of huge pages, "
            f"{size(view.room.huge_page_bytes)} are free on {view.host.name}",
            "reserve them there: sysctl vm.nr_hugepages",
        )


def _name(wanted: SourceFacts, view: TargetView, _mode: str) -> Iterator[Finding]:
    spec = wanted.spec
    for holder in view.holders:
        what = "a container that is on its way there" if holder.arriving else f"container {holder.id}"
        if holder.id == spec.id:
            yield blocker(
                "id",
                f"this very container ({spec.id}) is on {view.host.name} already",
                "`cmigrate ps -a` there tells how; `cmigrate undo --forget` there gives up a copy that is kept",
            )
        elif holder.name == spec.name:
            yield blocker(
                "name",
                f"the name {spec.name} is taken on {view.host.name} by {what}",
                f"cmigrate rm {spec.name} there, if it is not needed",
            )


def _address(wanted: SourceFacts, view: TargetView, _mode: str) -> Iterator[Finding]:
    network = wanted.spec.network
    if network is None:
        return
    try:
        address = ipaddress.ip_interface(network.address).ip
    except ValueError:
        yield blocker("address", f"{network.address!r} is no address", "inspect the container on the source")
        return
    for holder in view.holders:
        if holder.network is not None and _ip(holder.network.address) == address and holder.id != wanted.spec.id:
            yield blocker(
                "address",
                f"{address} belongs to container {holder.name} of {view.host.name}",
                f"cmigrate rm {holder.name} there, if it is not needed",
            )
    for holder in view.holders:
        same = holder.network is not None and network.address6 and _ip(holder.network.address6) == _ip(network.address6)
        if same and holder.id != wanted.spec.id:
            yield blocker(
                "address",
                f"{network.address6} belongs to container {holder.name} of {view.host.name}",
                f"cmigrate rm {holder.name} there, if it is not needed",
            )
    # On a shared network it is the container itself, still on the source, that answers.
    if view.address_at and view.address_at != network.mac.lower():
        yield blocker(
            "address",
            f"{address} is in use on the network of {view.host.name}, by {view.address_at}",
            "free the address there",
        )
    if view.network_mismatch:
        own = f"--subnet {ipaddress.ip_interface(network.address).network} --gateway {network.gateway}"
        yield blocker(
            "network",
            f"{view.host.name}: {view.network_mismatch}",
            f"cmigrate network create {network.name} {own} there",
        )
    host = host_for(view.host, network)
    if address not in ipaddress.ip_network(host.subnet, strict=False):
        yield blocker(
            "subnet",
            f"{address} is not in {view.host.subnet}, the subnet of {view.host.name}",
            "set the same subnet in config.toml of both hosts",
        )
    elif network.gateway != host.gateway:
        yield warning(
            "gateway",
            f"the container's way out is {network.gateway}, and the gateway of {view.host.name} is {view.host.gateway}",
            "set the same gateway in config.toml of both hosts",
        )


def _ip(address: str) -> object:
    try:
        return ipaddress.ip_interface(address).ip
    except ValueError:
        return None


def _ports(wanted: SourceFacts, view: TargetView, _mode: str) -> Iterator[Finding]:
    for port in wanted.spec.ports:
        text = f"{port.protocol} port {port.host_port}"
        owner = next((holder.name for holder in view.holders for other in holder.ports if _clash(port, other)), "")
        if owner:
            yield blocker(
                "port",
                f"{text} of {view.host.name} is published by its container {owner}",
                f"cmigrate stop {owner} there",
            )
        elif port.host_port in view.bound_ports.get(port.protocol, ()):
            yield blocker("port", f"{text} of {view.host.name} is in use by a program there", "stop that program")


def _clash(one: PortMapping, other: PortMapping) -> bool:
    everywhere = "0.0.0.0" in (one.host_address, other.host_address)
    same = (one.protocol, one.host_port) == (other.protocol, other.host_port)
    return same and (everywhere or one.host_address == other.host_address)


def _rootfs(wanted: SourceFacts, view: TargetView, _mode: str) -> Iterator[Finding]:
    rootfs = wanted.spec.rootfs
    if not view.rootfs_exists:
        yield blocker(
            "rootfs", f"the root directory {rootfs} is not on {view.host.name}", "copy it there, to the same path"
        )
        return
    differing = [text for file in wanted.files if (text := difference(file, view.files.get(file.path)))]
    if differing:
        where = "the root" if rootfs == "host" else rootfs
        yield blocker(
            "files",
            f"{len(differing)} of {len(wanted.files)} files in use differ in {where} of {view.host.name}: "
            f"{named(differing)}",
            "install the same packages in the same versions on both hosts",
        )
    if not wanted.files_complete:
        yield warning("files", "the container uses more files than are compared beforehand; the restore compares them")


def difference(there: LowerFile, here: LowerFile | None) -> str:
    """How this host's file differs from the source's in what CRIU compares; empty when it does not."""
    if here is None:
        return f"{there.path} is missing"
    if there.build_id and there.build_id != here.build_id:
        return f"{there.path} is another build"
    if there.size_bytes != here.size_bytes:
        return f"{there.path} has {here.size_bytes} bytes instead of {there.size_bytes}"
    if there.mode != here.mode:
        return f"{there.path} has mode {here.mode:o} instead of {there.mode:o}"
    return ""


def _volumes(wanted: SourceFacts, view: TargetView, _mode: str) -> Iterator[Finding]:
    if view.missing_volumes:
        yield blocker(
            "volumes",
            f"not on {view.host.name}: {named(view.missing_volumes)}",
            "mount the shared storage at the same path; what is in volumes does not move",
        )
    elif wanted.spec.volumes:
        sources = named([volume.source for volume in wanted.spec.volumes])
        yield warning(
            "volumes", f"what is in {sources} does not move", "make sure that both hosts see the same storage"
        )


def _clock(wanted: SourceFacts, view: TargetView, _mode: str) -> Iterator[Finding]:
    ahead = view.clock_s - wanted.clock_s
    if abs(ahead) > CLOCK_TOLERANCE_S:
        direction = "ahead of" if ahead > 0 else "behind"
        yield warning(
            "clock",
            f"the clock of {view.host.name} is {abs(ahead)} s {direction} the source's: the time of day will jump",
            "synchronise both clocks, with chrony for example",
        )


def _size(wanted: SourceFacts, _view: TargetView, _mode: str) -> Iterator[Finding]:
    if not wanted.upper_complete:
        yield warning(
            "upper-layer", f"the root difference has {size(wanted.upper_bytes)} or more: room was not checked"
        )


CHECKS: tuple[tuple[str, Check, str], ...] = (
    ("arch", _machine, "same architecture and page size"),
    ("criu", _criu, "CRIU works, and reads the source's images"),
    ("cpu", _cpu, "the CPU can all the source's can"),
    ("kernel", _features, "the kernel has what containers need"),
    ("room", _room, "memory and disk have room"),
    ("upper-layer", _size, "the size of the root difference is known"),
    ("name", _name, "name and id are free"),
    ("address", _address, "the address is free and belongs here"),
    ("port", _ports, "published ports are free"),
    ("files", _rootfs, "the files in use are the same"),
    ("volumes", _volumes, "no volume is missing"),
    ("clock", _clock, "both clocks agree"),
)
