"""Preflight on both hosts, before anything happens to a container."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from migrate import messages, preflight
from migrate.course import Course
from migrate.errors import MoveRefused
from migrate.links import Session
from migrate.observe import Held, Warning
from runtime.api import Container
from runtime.connections import TcpPolicy
from runtime.container import Containers
from transport.api import Deadline, Frame

PREFLIGHT_TIMEOUT_S = 30.0


def check_both(
    containers: Containers, container: Container, session: Session, course: Course, held: Held, tcp: TcpPolicy
) -> None:
    """Preflight on both hosts; raises MoveRefused with all blockers of both at once."""
    seen = preflight.check_source(containers, container, mode=course.mode, tcp=tcp)
    question = messages.Preflight(
        spec=container.spec, mode=course.mode, memory_bytes=course.memory_bytes, facts=seen.facts
    )
    deadline = Deadline.after(PREFLIGHT_TIMEOUT_S)
    session.channel.send(Frame.control(question.to_message()), deadline=deadline)
    here = [finding.to_json() for finding in seen.findings]
    answer = messages.Findings.parse(session.channel.receive(deadline=deadline).message())
    course.versions = replace(
        course.versions,
        criu_target=answer.versions.get("criu", ""),
        kernel_target=answer.versions.get("kernel", ""),
    )
    findings: list[Mapping[str, Any]] = [*here, *answer.findings]
    for finding in findings:
        if finding["level"] == "warning":
            held.on_event(Warning(what=str(finding["what"]), remedy=str(finding["remedy"])))
    blockers = [finding for finding in findings if finding["level"] == "blocker"]
    if blockers:
        count = "1 reason" if len(blockers) == 1 else f"{len(blockers)} reasons"
        raise MoveRefused(
            f"{course.container} can not move to {course.target}, for {count}", blockers=[dict(b) for b in blockers]
        )
