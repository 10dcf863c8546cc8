"""Can this container leave? Judgement is pure (``judge_source``); reading is runtime.facts."""

from __future__ import annotations

import mmap
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from migrate.preflight.connections import check_connections
from migrate.preflight.findings import Finding, blocker, named, ok, size, warning
from migrate.preflight.wireform import SourceFacts, needs_of, write_facts
from runtime.api import Container, ContainerSpec, Status
from runtime.connections import TcpPolicy
from runtime.container import Containers
from runtime.criu.features import CriuFeatures
from runtime.facts import ContainerFacts, read_facts
from runtime.facts_host import Room, has_sys_resource, probe_criu, read_room
from runtime.facts_obstacles import Kind, Obstacle
from runtime.linux.procfs import parse_cpu_flags

SLACK_BYTES = 16 << 20
"""Room for CRIU's own images, journals and logs."""


@dataclass(frozen=True, kw_only=True)
class SourceView:
    """The source host, as far as a move needs it. ``criu_error`` says why ``criu`` is None."""

    criu: CriuFeatures | None
    criu_error: str
    has_sys_resource: bool
    room: Room


@dataclass(frozen=True, kw_only=True)
class SourceCheck:
    """One look at the container: ``facts`` for the target (plain values), ``findings`` of this side."""

    facts: dict[str, object]
    findings: list[Finding]


def check_source(
    containers: Containers, container: Container, *, mode: str = "diskless", tcp: TcpPolicy = "keep"
) -> SourceCheck:
    """Read once, judge, and write what the target needs. Nothing is stopped or changed."""
    facts = read_facts(containers, container)
    view = _view(containers)
    return SourceCheck(
        facts=write_facts(_for_target(container.spec, facts, view)),
        findings=[*judge_source(container.spec, facts, view, mode), *check_connections(containers, container, tcp)],
    )


def source_facts(containers: Containers, container: Container) -> dict[str, object]:
    """What the target must know, as plain values that msgpack carries."""
    return check_source(containers, container).facts


def source_findings(containers: Containers, container: Container, *, mode: str = "diskless") -> list[Finding]:
    """Everything that keeps the container here, at once, and what will be different after a move."""
    return check_source(containers, container, mode=mode).findings


def _view(containers: Containers) -> SourceView:
    found = probe_criu(containers.host)
    return SourceView(
        criu=found.features,
        criu_error=found.error,
        has_sys_resource=has_sys_resource(),
        room=read_room(containers.host),
    )


def _for_target(spec: ContainerSpec, facts: ContainerFacts, view: SourceView) -> SourceFacts:
    return SourceFacts(
        spec=spec,
        arch=platform.machine(),
        page_bytes=mmap.PAGESIZE,
        kernel=os.uname().release,
        criu_version=view.criu.version if view.criu else (0, 0, 0),
        cpuinfo=view.criu.cpuinfo if view.criu else b"",
        cpu_flags=parse_cpu_flags(Path("/proc/cpuinfo").read_text()),
        clock_s=int(time.time()),
        needs=needs_of(facts),
        processes=facts.processes,
        memory_bytes=facts.memory_bytes,
        hugetlb_bytes=facts.hugetlb_bytes,
        tmpfs_bytes=facts.tmpfs_bytes,
        upper_bytes=facts.upper_bytes,
        upper_complete=facts.upper_complete,
        files=facts.files,
        files_complete=facts.files_complete,
    )


def judge_source(spec: ContainerSpec, facts: ContainerFacts, view: SourceView, mode: str) -> list[Finding]:
    """Pure. One ``ok`` when nothing else is found."""
    if facts.status not in (Status.RUNNING, Status.PAUSED):
        return [blocker("state", f"container {spec.name} is {facts.status}", f"cmigrate start {spec.name}")]
    found: list[Finding] = []
    if facts.status == Status.PAUSED:
        found.append(blocker("state", f"container {spec.name} is paused", f"cmigrate unpause {spec.name}"))
    found += _judge_criu(facts, view)
    found += judge_obstacles(facts.obstacles)
    found += _judge_users(spec, facts, view)
    found += _judge_room(facts, view, mode)
    found += _judge_comfort(spec, facts)
    if not any(finding.level == "blocker" for finding in found):
        found.append(
            ok(
                "contents",
                f"CRIU can carry all of it: {facts.processes} processes, {size(facts.memory_bytes)} of memory",
            )
        )
    return found


def _judge_criu(facts: ContainerFacts, view: SourceView) -> Iterator[Finding]:
    if view.criu is None:
        yield blocker("criu", f"CRIU does not work on the source: {view.criu_error}", "run scripts/setup there")
        return
    if view.criu.check_error:
        yield blocker("criu", f"CRIU's own check fails on the source: {view.criu.check_error}", "run cmigrate doctor")
    if facts.compat_tasks and "compat_cr" in view.criu.missing:
        yield blocker(
            "32-bit",
            f"{named(facts.compat_tasks)} is a 32-bit program, which the source's CRIU cannot dump",
            "use a 64-bit build of it, or a CRIU built with 32-bit support",
        )


def _judge_users(spec: ContainerSpec, facts: ContainerFacts, view: SourceView) -> Iterator[Finding]:
    # Seen as "Can't get rlimit 0": prlimit(2) of another uid needs CAP_SYS_RESOURCE in the task's user namespace.
    if spec.userns == "host" and facts.other_users and not view.has_sys_resource:
        yield blocker(
            "users",
            f"{named(facts.other_users)} does not run as root, and without CAP_SYS_RESOURCE CRIU cannot dump it",
            "run the container with its own user namespace (leave out --userns host)",
        )


def _judge_room(facts: ContainerFacts, view: SourceView, mode: str) -> Iterator[Finding]:
    wanted = facts.memory_bytes + SLACK_BYTES
    if mode == "stopcopy" and wanted > view.room.state_bytes:
        yield blocker(
            "room",
            f"the image files need {size(wanted)}, the source's state directory has {size(view.room.state_bytes)} free",
            "free space there, or move with --mode diskless",
        )


def _judge_comfort(spec: ContainerSpec, facts: ContainerFacts) -> Iterator[Finding]:
    if facts.exec_sessions:
        programs = "1 program" if facts.exec_sessions == 1 else f"{facts.exec_sessions} programs"
        yield warning(
            "exec",
            f"{programs} started by cmigrate exec will move along, and the command that waits for it ends",
            "wait for it, or start it with exec -d",
        )
    if facts.followers:
        yield warning(
            "tail",
            f"{named(facts.followers)} follows a file and may end after the move, which looks like an error to it",
            "let the program write its log to stdout instead",
        )
    if not facts.upper_complete:
        yield warning(
            "upper-layer", f"the root difference is large: {size(facts.upper_bytes)} were counted and there is more"
        )


_SENTENCES: dict[Kind, tuple[str, str, str]] = {
    "io_uring": (
        "io_uring",
        "{who} uses io_uring, which CRIU cannot dump",
        "run the container with the default seccomp profile: programs then do without",
    ),
    "kernel object": (
        "kernel-object",
        "{who} holds kernel objects CRIU cannot dump: {what}",
        "stop the program, or switch the feature off that uses them",
    ),
    "device": ("device", "{who} uses devices CRIU cannot dump: {what}", "stop the program, or take the device from it"),
    "socket": (
        "socket",
        "{who} has sockets of protocols CRIU cannot dump: {what}",
        "switch the protocol off in the program (for Go and MPTCP: GODEBUG=multipathtcp=0) and restart it",
    ),
    "unix socket": (
        "unix-socket",
        "{who} has a unix socket that leads out of the container: {what}",
        "stop the program at either end, or let it reconnect after the move",
    ),
    "terminal": (
        "terminal",
        "{who} uses a terminal of the host: {what}",
        "end the cmigrate exec session at that terminal",
    ),
    "outside file": (
        "outside-file",
        "{who} has files open that are not the container's: {what}",
        "end the cmigrate exec session that passed them in, or close them",
    ),
    "namespace": (
        "namespace",
        "{who} is in namespaces of its own ({what}), which CRIU cannot nest",
        "stop it, or switch its sandbox off",
    ),
    "traced": ("traced", "{who} is being traced", "detach the debugger"),
    "outside process": (
        "outside-process",
        "{who} entered the container from outside and is no child of its first process",
        "end it, and use cmigrate exec instead",
    ),
}


def judge_obstacles(obstacles: tuple[Obstacle, ...]) -> list[Finding]:
    """One blocker for each kind, naming processes and things."""
    found = []
    for kind, (check, sentence, remedy) in _SENTENCES.items():
        mine = [obstacle for obstacle in obstacles if obstacle.kind == kind]
        if mine:
            who = named([obstacle.who for obstacle in mine])
            what = named([obstacle.what for obstacle in mine])
            found.append(blocker(check, sentence.format(who=who, what=what), remedy))
    return found
