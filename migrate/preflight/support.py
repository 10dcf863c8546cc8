"""The judgement over a host: what containers and moves need against what kernel and programs give. Pure.

An absent feature is a blocker only when nothing stands in for it; otherwise the finding says what does.
"""

from __future__ import annotations

from collections.abc import Iterator

from migrate.preflight.findings import Finding, blocker, named, ok, size, warning
from runtime.facts_host import CgroupSupport, HostFacts, KernelSupport, Room
from runtime.host import HostConfig

# Below, even a small container's move may fail for want of room.
LITTLE_DISK_BYTES = 256 << 20
LITTLE_MEMORY_BYTES = 256 << 20


def judge_host(host: HostConfig, facts: HostFacts) -> list[Finding]:
    """Everything but leftovers."""
    return [
        *_criu(facts),
        *judge_kernel(facts.kernel),
        *_dirty_pages(facts),
        *_rights(facts),
        *_network(facts),
        *_programs(facts),
        *judge_room(host, facts.room),
        *_comfort(host, facts),
    ]


def _criu(facts: HostFacts) -> Iterator[Finding]:
    found = facts.criu
    if found.features is None:
        yield blocker("criu", f"CRIU does not work: {found.error}", found.hint or "run scripts/setup")
        return
    features = found.features
    if features.check_error:
        yield blocker(
            "criu",
            f"CRIU {features.version_text} says of this kernel: {features.check_error}",
            "run scripts/setup, which finds a CRIU that works here",
        )
    else:
        yield ok("criu", f"CRIU {features.version_text} works: {found.program}")
    if "network_lock_nftables" in features.missing:
        yield blocker("criu-nftables", "CRIU cannot lock the network by nftables", "install a CRIU built with nftables")
    if "timens" in features.missing or not facts.kernel.has_time_namespace:
        yield warning(
            "time-namespace",
            "no time namespaces: monotonic clocks jump when a container is restored on a host with another uptime",
            "use a kernel with CONFIG_TIME_NS",
        )
    if "compat_cr" in features.missing:
        yield warning("32-bit", "CRIU cannot dump 32-bit programs here; 64-bit ones move", "use 64-bit programs")


def judge_kernel(kernel: KernelSupport) -> Iterator[Finding]:
    """What every container needs."""
    if kernel.namespaces:
        yield blocker(
            "namespaces",
            f"no new {named(kernel.namespaces)} namespaces can be made",
            "check sysctl user.max_*_namespaces, and the kernel's CONFIG_*_NS",
        )
    else:
        yield ok("namespaces", "all kinds of namespaces can be made")
    if kernel.overlay_error:
        yield blocker(
            "overlayfs",
            f"an overlay on the state directory's file system does not work: {kernel.overlay_error}",
            "modprobe overlay; keep the state directory on a local ext4, xfs or btrfs",
        )
    else:
        yield ok("overlayfs", "overlayfs works on the state directory's file system")
    if kernel.network_error:
        yield blocker(
            "network",
            f"a bridge with a veth pair and nftables rules cannot be made: {kernel.network_error}",
            "install nftables; modprobe veth bridge nf_tables nft_chain_nat nft_fib_ipv4",
        )
    else:
        yield ok("network", "bridge, veth and nftables work")
    yield from _cgroup(kernel.cgroup)


def _cgroup(cgroup: CgroupSupport) -> Iterator[Finding]:
    if not cgroup.freezer:
        yield blocker(
            "freezer",
            "no cgroup freezer: a container could not be stopped for a move",
            "mount -t cgroup2 none /sys/fs/cgroup",
        )
    elif cgroup.freezer == "v1":
        yield warning("freezer", "no cgroup v2 freezer; the v1 freezer is used instead and takes longer to stop")
    else:
        yield ok("freezer", "the cgroup v2 freezer is there")
    if cgroup.freezer and not cgroup.has_kill:
        yield ok("cgroup-kill", "no cgroup.kill: processes are killed one by one instead")
    if cgroup.missing:
        yield warning(
            "controllers",
            f"no hierarchy has the controllers {named(cgroup.missing)}: containers with such limits are refused",
            "boot with them enabled (cgroup_enable=memory, for example)",
        )


def _dirty_pages(facts: HostFacts) -> Iterator[Finding]:
    features = facts.criu.features
    soft_dirty = features is not None and features.mem_track
    if facts.kernel.async_write_protect and facts.kernel.pagemap_scan:
        yield ok("dirty-pages", "userfaultfd and PAGEMAP_SCAN can find dirty pages while a container runs")
    elif soft_dirty:
        yield ok(
            "dirty-pages", "no asynchronous userfaultfd; the kernel's soft-dirty bits can find dirty pages instead"
        )
    else:
        yield warning(
            "dirty-pages",
            "the kernel cannot tell which pages were written: pages have to be compared by their hashes instead",
            "use Linux 6.7 or later for short blackouts",
        )
    if features is not None and not features.lazy_pages:
        yield warning("lazy-pages", "no userfaultfd for restored memory: it is filled before the container resumes")


def _rights(facts: HostFacts) -> Iterator[Finding]:
    if facts.has_sys_resource:
        yield ok("sys-resource", "CAP_SYS_RESOURCE is there")
    else:
        yield ok(
            "sys-resource",
            "no CAP_SYS_RESOURCE: programs of other users move only in a container with its own user namespace, "
            "which is the default; --userns host containers must run as root",
        )


def _network(facts: HostFacts) -> Iterator[Finding]:
    if not facts.loopback_up:
        yield blocker("loopback", "the loopback interface is down, and CRIU needs it", "ip link set lo up")
    if facts.ip_forward:
        yield ok("ip-forward", "packets are forwarded")
    else:
        yield ok("ip-forward", "packets are not forwarded yet: the first container switches it on")


def _programs(facts: HostFacts) -> Iterator[Finding]:
    if facts.missing_programs:
        yield blocker("programs", f"not installed: {named(facts.missing_programs)}", "run scripts/setup")
    if facts.init_program:
        yield ok("init", f"containers get {facts.init_program} as their first process")
    else:
        yield warning("init", "no static init program: containers start only with --no-init", "apt install tini")


def judge_room(host: HostConfig, room: Room) -> Iterator[Finding]:
    """Whether there is room for anything at all; a move asks for more precisely."""
    for check, what, free, little in (
        ("disk", f"in {host.state_dir}", room.state_bytes, LITTLE_DISK_BYTES),
        ("memory", "of memory", room.memory_bytes, LITTLE_MEMORY_BYTES),
    ):
        if free < little:
            yield warning(check, f"only {size(free)} free {what}", "make room")
        else:
            yield ok(check, f"{size(free)} free {what}")


def _comfort(host: HostConfig, facts: HostFacts) -> Iterator[Finding]:
    if not facts.criu_cache_is_tmpfs:
        yield warning(
            "criu-cache",
            "/run is no tmpfs: CRIU probes the kernel again at every start, which adds about 50 ms to each blackout",
            "mount -t tmpfs -o mode=755 tmpfs /run early at boot",
        )
    if facts.agent_listens:
        yield ok("agent", f"something listens on port {host.stream_port}, where cmigrate serve does")
    else:
        yield ok("agent", "no agent listens: moves to this host go over ssh, which starts one for each")
    if not facts.name_resolves:
        yield warning(
            "name",
            f"this host's name {host.name} does not resolve here",
            "add it to /etc/hosts, or give peers the address: cmigrate host add",
        )
    if not facts.clock_synchronised:
        yield warning(
            "clock",
            "the clock is not synchronised: a container's time of day may jump when it moves",
            "install chrony or systemd-timesyncd",
        )
