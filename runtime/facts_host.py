"""What this host has and lacks, by trying it. Nothing stays: probes run in namespaces that end with them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from runtime.cgroup_layout import CgroupLayout
from runtime.criu.binary import find_criu
from runtime.criu.features import CriuFeatures, criu_features
from runtime.errors import RuntimeFault
from runtime.host import HostConfig
from runtime.linux import calls, probes
from runtime.linux.procfs import (
    TCP_LISTEN,
    UDP_BOUND,
    mount_of,
    parse_bound_ports,
    parse_capabilities,
    parse_meminfo,
    parse_mounts,
)
from runtime.network import run_nft
from runtime.rootfs import INIT_PROGRAMS

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAM_TIMEOUT_S = 10.0
# nft: addresses and ports. tar: CRIU packs tmpfs mounts that a container made itself.
PROGRAMS = ("nft", "tar")
# unshare(1)'s options, of the namespaces that every container gets.
NAMESPACES = ("user", "mount", "pid", "net", "uts", "ipc", "cgroup")
CONTROLLERS = ("cpu", "memory", "pids")
CAP_SYS_RESOURCE = 24


@dataclass(frozen=True, kw_only=True)
class Room:
    """What is free, in bytes; ``huge_page_bytes`` are of huge pages that are reserved and unused."""

    memory_bytes: int
    memory_total_bytes: int
    huge_page_bytes: int
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class CgroupSupport:
    """``freezer`` is "v2", "v1" or empty; ``missing`` controllers are in no hierarchy."""

    freezer: str
    has_kill: bool
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class KernelSupport:
    """``overlay_error`` and ``network_error`` are empty when it works. ``namespaces`` are those that are missing."""

    release: str
    namespaces: tuple[str, ...]
    has_time_namespace: bool
    overlay_error: str
    network_error: str
    cgroup: CgroupSupport
    async_write_protect: bool
    pagemap_scan: bool


@dataclass(frozen=True, kw_only=True)
class HostCriu:
    """``features`` is None where ``error`` says why. ``program`` is its path and where it was found."""

    features: CriuFeatures | None
    error: str = ""
    hint: str = ""
    program: str = ""


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """Everything ``cmigrate doctor`` judges."""

    criu: HostCriu
    kernel: KernelSupport
    has_sys_resource: bool
    loopback_up: bool
    ip_forward: bool
    init_program: str
    missing_programs: tuple[str, ...]
    criu_cache_is_tmpfs: bool
    room: Room
    name_resolves: bool
    agent_listens: bool
    clock_synchronised: bool


def probe_criu(host: HostConfig) -> HostCriu:
    """This host's CRIU and what it can do; from the cache when there is one."""
    program = ""
    try:
        binary = find_criu()
        program = f"{binary.argv[-1]} ({binary.origin})"
        return HostCriu(features=criu_features(binary, host.run_dir), program=program)
    except RuntimeFault as error:
        return HostCriu(features=None, error=error.what, hint=error.hint, program=program)
    except OSError as error:
        return HostCriu(features=None, error=str(error), program=program)


def has_sys_resource() -> bool:
    """Whether this process may change other users' resource limits, as CRIU must outside a user namespace."""
    return bool(parse_capabilities(Path("/proc/self/status").read_text()) >> CAP_SYS_RESOURCE & 1)


def read_host_facts(host: HostConfig) -> HostFacts:
    """About a third of a second the first time after a boot, 50 ms later. Needs root."""
    return HostFacts(
        criu=probe_criu(host),
        kernel=read_kernel_support(host),
        has_sys_resource=has_sys_resource(),
        loopback_up=_loopback_is_up(),
        ip_forward=_reads("/proc/sys/net/ipv4/ip_forward", "1"),
        init_program=next((path for path in INIT_PROGRAMS if os.access(path, os.X_OK)), ""),
        missing_programs=tuple(name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None),
        criu_cache_is_tmpfs=is_on_tmpfs(Path("/run")),
        room=read_room(host),
        name_resolves=_resolves(host.name),
        agent_listens=host.stream_port in bound_ports("tcp"),
        clock_synchronised=probes.clock_is_synchronised(),
    )


def read_kernel_support(host: HostConfig) -> KernelSupport:
    """Namespaces, overlay, network and cgroups are made and removed again to know that they work."""
    return KernelSupport(
        release=os.uname().release,
        namespaces=missing_namespaces(),
        has_time_namespace=os.path.exists("/proc/self/ns/time"),
        overlay_error=probe_overlay(host.state_dir),
        network_error=probe_network(),
        cgroup=probe_cgroup(),
        async_write_protect=probes.has_async_write_protect(),
        pagemap_scan=probes.has_pagemap_scan(),
    )


def missing_namespaces(names: Sequence[str] = NAMESPACES) -> tuple[str, ...]:
    """Those that a child process can not get."""
    if _unshare(names):
        return ()
    return tuple(name for name in names if not _unshare([name])) or tuple(names)


def _unshare(names: Sequence[str]) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["unshare", *(f"--{name}" for name in names), "--fork", "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROGRAM_TIMEOUT_S,
            check=False,
            env={"PATH": SEARCH_PATH},
        )
        return done.returncode == 0
    return False


def probe_overlay(state_dir: Path) -> str:
    """Write through an overlay with its upper layer on the file system of ``state_dir``; empty when that works."""
    base = next(path for path in (state_dir, *state_dir.parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".cmigrate-doctor-", dir=base) as made:
            for name in ("lower", "upper", "work", "root"):
                Path(made, name).mkdir()
            probes.in_fresh_namespaces(calls.CLONE_NEWNS, lambda: _write_through_overlay(made))
        return ""
    except (OSError, RuntimeFault) as error:
        return str(error)


def _write_through_overlay(made: str) -> None:
    options = f"lowerdir={made}/lower,upperdir={made}/upper,workdir={made}/work"
    calls.mount("overlay", f"{made}/root", "overlay", 0, options)
    Path(made, "root", "file").write_text("x")
    os.setxattr(f"{made}/upper/file", "trusted.overlay.opaque", b"y")


def probe_network() -> str:
    """A bridge, a veth pair and an nftables NAT chain, in a network namespace of their own; empty when they work."""
    try:
        probes.in_fresh_namespaces(calls.CLONE_NEWNET, _make_network)
        return ""
    except NetlinkError as error:
        return f"netlink: {error.args[-1]}"
    except (OSError, RuntimeFault) as error:
        return str(error)


def _make_network() -> None:
    with IPRoute() as netlink:
        netlink.link("add", ifname="probe0", kind="bridge")
        netlink.link("add", ifname="probe1", kind="veth", peer={"ifname": "probe2"})
        bridge, port = (netlink.link_lookup(ifname=name)[0] for name in ("probe0", "probe1"))
        netlink.link("set", index=port, master=bridge)
    run_nft(
        "table ip probe { chain a { type nat hook prerouting priority dstnat;"
        " fib daddr type local tcp dport 80 dnat to 10.0.0.1:80; }\n"
        " chain b { type nat hook postrouting priority srcnat; ip saddr 10.0.0.0/8 masquerade; }\n}\n"
    )


def probe_cgroup() -> CgroupSupport:
    """The v2 files are looked for in a group made for it: the root has none of them."""
    try:
        layout = CgroupLayout.probe()
    except RuntimeFault:
        return CgroupSupport(freezer="", has_kill=False, missing=CONTROLLERS)
    v1 = dict(layout.v1)
    present = set(v1)
    freezer, has_kill = "v1" if "freezer" in v1 else "", False
    if layout.v2 is not None:
        made = layout.v2 / f"cmigrate-doctor-{os.getpid()}"
        with contextlib.suppress(OSError):
            present |= set((layout.v2 / "cgroup.controllers").read_text().split())
            made.mkdir()
            try:
                freezer = "v2" if (made / "cgroup.freeze").exists() else freezer
                has_kill = (made / "cgroup.kill").exists()
            finally:
                made.rmdir()
    return CgroupSupport(
        freezer=freezer, has_kill=has_kill, missing=tuple(name for name in CONTROLLERS if name not in present)
    )


def read_room(host: HostConfig) -> Room:
    """Directories that are not there yet count as the place where they will be."""
    memory = parse_meminfo(Path("/proc/meminfo").read_text())
    return Room(
        memory_bytes=memory.get("MemAvailable", 0),
        memory_total_bytes=memory.get("MemTotal", 0),
        huge_page_bytes=memory.get("HugePages_Free", 0) * memory.get("Hugepagesize", 0),
        state_bytes=_free_bytes(host.state_dir),
    )


def _free_bytes(directory: Path) -> int:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize


def is_on_tmpfs(directory: Path) -> bool:
    """Whether files made there never reach a disk."""
    mounts = parse_mounts(Path("/proc/self/mountinfo").read_text())
    mount = mount_of(os.path.realpath(directory), mounts)
    return mount is not None and mount.kind in ("tmpfs", "ramfs")


def _reads(path: str, wanted: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip() == wanted
    return False


def _loopback_is_up() -> bool:
    """CRIU probes TCP over it at every start."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
            probe.settimeout(1)
            probe.connect(("127.0.0.1", probe.getsockname()[1]))  # a socket may connect to itself
            return True
        except OSError:
            return False


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def bound_ports(protocol: str) -> frozenset[int]:
    """Ports of this host's own programs: those that listen (tcp) or are bound (udp)."""
    found: frozenset[int] = frozenset()
    for family in ("", "6"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/net/{protocol}{family}").read_text()
            found |= parse_bound_ports(text, TCP_LISTEN if protocol == "tcp" else UDP_BOUND)
    return found
