"""A healthy host and a container that may move, for tests to spoil in one place."""

from dataclasses import replace
from typing import Any

from migrate.preflight.source import SourceView
from migrate.preflight.suitability import Holder, TargetView
from migrate.preflight.wireform import SourceFacts
from runtime.api import ContainerSpec, NetworkSpec, PortMapping, Status, VolumeMount
from runtime.criu.features import CriuFeatures
from runtime.facts import ContainerFacts, LowerFile
from runtime.facts_host import CgroupSupport, HostCriu, HostFacts, KernelSupport, Room
from runtime.host import HostConfig

MIB = 1 << 20
NETWORK = NetworkSpec(address="10.88.0.5/16", mac="02:42:0a:58:00:05", gateway="10.88.0.1")
LIBC = LowerFile(path="/usr/lib/libc.so.6", size_bytes=1000, mode=0o100755, build_id="ab" * 20)
HOST = HostConfig(name="target")

SPEC = ContainerSpec(
    id="0123456789ab",
    name="web1",
    rootfs="/srv/image",
    argv=("redis-server",),
    created_at="2026-01-01T00:00:00.000Z",
    network=NETWORK,
    ports=(PortMapping(host_port=8080, container_port=80),),
    volumes=(VolumeMount(source="/srv/data", destination="/data"),),
)
CRIU = CriuFeatures(
    version=(4, 2, 1),
    check_error="",
    mem_track=False,
    lazy_pages=True,
    pidfd_store=True,
    missing=(),
    cpuinfo=b"cpu",
)
KERNEL = KernelSupport(
    release="6.12.0",
    namespaces=(),
    has_time_namespace=True,
    overlay_error="",
    network_error="",
    cgroup=CgroupSupport(freezer="v2", has_kill=True, missing=()),
    async_write_protect=True,
    pagemap_scan=True,
)
ROOM = Room(
    memory_bytes=1024 * MIB,
    memory_total_bytes=2048 * MIB,
    huge_page_bytes=0,
    state_bytes=1024 * MIB,
)
HOST_FACTS = HostFacts(
    criu=HostCriu(features=CRIU, program="/usr/sbin/criu (host)"),
    kernel=KERNEL,
    has_sys_resource=True,
    loopback_up=True,
    ip_forward=True,
    init_program="/usr/bin/tini-static",
    missing_programs=(),
    criu_cache_is_tmpfs=True,
    room=ROOM,
    name_resolves=True,
    agent_listens=True,
    clock_synchronised=True,
)
FACTS = SourceFacts(
    spec=SPEC,
    arch="x86_64",
    page_bytes=4096,
    kernel="6.12.0",
    criu_version=(4, 2, 1),
    cpuinfo=b"cpu",
    cpu_flags=("avx", "fpu"),
    clock_s=1000,
    needs=(),
    processes=2,
    memory_bytes=64 * MIB,
    hugetlb_bytes=0,
    tmpfs_bytes=MIB,
    upper_bytes=MIB,
    upper_complete=True,
    files=(LIBC,),
    files_complete=True,
)
VIEW = TargetView(
    host=HOST,
    arch="x86_64",
    page_bytes=4096,
    clock_s=1001,
    criu=CRIU,
    criu_error="",
    criu_hint="",
    cpu_error="",
    cpu_flags=("avx", "avx2", "fpu"),
    has_ipv6=True,
    kernel=KERNEL,
    room=ROOM,
    holders=(),
    bound_ports={"tcp": frozenset({22})},
    rootfs_exists=True,
    missing_volumes=(),
    files={LIBC.path: LIBC},
    address_at=NETWORK.mac,
)
SOURCE_VIEW = SourceView(criu=CRIU, criu_error="", has_sys_resource=True, room=ROOM)
CONTAINER = ContainerFacts(status=Status.RUNNING, processes=2, threads=3, memory_bytes=64 * MIB)


def holder(**changes: Any) -> Holder:
    """Another container of the target, which is in nobody's way."""
    return replace(Holder(id="aaaaaaaaaaaa", name="db1", network=None), **changes)
