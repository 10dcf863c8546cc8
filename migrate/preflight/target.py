"""Can this host take the container? What the source says comes from a peer; what this host is, is read here."""

from __future__ import annotations

import ipaddress
import mmap
import os
import platform
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from migrate.preflight.findings import Finding
from migrate.preflight.suitability import Holder, TargetView, judge_target
from migrate.preflight.wireform import SourceFacts, read_facts
from runtime.api import Status
from runtime.container import Containers
from runtime.criu.binary import find_criu
from runtime.criu.features import CriuFeatures, cpu_mismatch
from runtime.errors import RuntimeFault
from runtime.facts_host import bound_ports, probe_criu, read_kernel_support, read_room
from runtime.facts_target import AddressProbe, lower_files_at
from runtime.host import HostConfig
from runtime.linux.procfs import parse_cpu_flags
from runtime.networks import host_for, network_mismatch

ADDRESS_ANSWER_S = 0.03
"""How long a machine on the bridge has to claim the container's address."""


def target_findings(
    host: HostConfig, containers: Containers, facts: Mapping[str, Any], *, mode: str = "diskless"
) -> list[Finding]:
    """Everything that keeps the container from moving here, at once. Reserves nothing.

    ``facts`` are a peer's ``source_facts``; raises ProtocolViolation when they do not fit. Takes about 70 ms.
    """
    wanted = read_facts(facts)
    return judge_target(wanted, read_view(host, containers, wanted), mode)


def read_view(host: HostConfig, containers: Containers, wanted: SourceFacts) -> TargetView:
    """This host, as far as this container needs it."""
    begin = time.monotonic()
    spec = wanted.spec
    with ExitStack() as stack:
        probe = None
        if spec.network is not None and _is_interface(spec.network.address):
            probe = stack.enter_context(AddressProbe(host_for(host, spec.network).bridge, spec.network))
        criu = probe_criu(host)
        holders = _holders(containers)
        view = TargetView(
            host=host,
            arch=platform.machine(),
            page_bytes=mmap.PAGESIZE,
            clock_s=int(time.time()),
            criu=criu.features,
            criu_error=criu.error,
            criu_hint=criu.hint,
            cpu_error=_cpu_error(host, criu.features, wanted),
            cpu_flags=parse_cpu_flags(Path("/proc/cpuinfo").read_text()),
            has_ipv6=os.path.exists("/proc/net/if_inet6"),
            kernel=read_kernel_support(host),
            room=read_room(host),
            holders=holders,
            network_mismatch=network_mismatch(host, spec.network) if probe is not None else "",
            bound_ports={kind: bound_ports(kind) for kind in {port.protocol for port in spec.ports}},
            rootfs_exists=spec.rootfs == "host" or os.path.isdir(spec.rootfs),
            missing_volumes=tuple(v.source for v in spec.volumes if not os.path.exists(v.source)),
            files=lower_files_at(spec.rootfs, wanted.files),
        )
        if probe is None:
            return view
        left = ADDRESS_ANSWER_S - (time.monotonic() - begin)
        return view.with_address_at(probe.answer(max(left, 0.002)))


def _is_interface(address: str) -> bool:
    try:
        return ipaddress.ip_interface(address).version == 4
    except ValueError:
        return False


def _cpu_error(host: HostConfig, criu: CriuFeatures | None, wanted: SourceFacts) -> str:
    """CRIU's own judgement; it need not be asked when both describe their CPU in the same bytes."""
    if criu is None or not wanted.cpuinfo or not criu.cpuinfo or wanted.cpuinfo == criu.cpuinfo:
        return ""
    try:
        return cpu_mismatch(find_criu(), wanted.cpuinfo, host.run_dir)
    except RuntimeFault as error:
        return error.what


def _holders(containers: Containers) -> tuple[Holder, ...]:
    """Who has names, ids, addresses and ports here: containers, and those on their way here."""
    up = (Status.RUNNING, Status.PAUSED)
    found = [
        Holder(id=c.id, name=c.name, network=c.spec.network, ports=c.spec.ports if c.state.status in up else ())
        for c in containers.list()
    ]
    return (
        *found,
        *(
            Holder(id=spec.id, name=spec.name, network=spec.network, ports=spec.ports, arriving=True)
            for _move, spec in containers.store.incoming()
        ),
    )
