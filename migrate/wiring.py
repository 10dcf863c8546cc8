"""Puts the parts together: one move from the operator's words to the kept report, and the agent's handlers."""

from __future__ import annotations

import contextlib
import platform
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from migrate import messages
from migrate.check import check_both
from migrate.course import Course, failed_report, keep_report, moved_report, report_of
from migrate.errors import (
    MemoryDiffers,
    MigrateError,
    RolledBack,
    TakenBack,
    Unhealthy,
    name_peer,
)
from migrate.giving_back import settle_stay
from migrate.health import HealthCheck, look_there
from migrate.leaving import Leaving
from migrate.links import Session, connect
from migrate.observe import Held, MoveEnded, MoveStarted, Observer, Planned, Warning
from migrate.outgoing import Pace
from migrate.packing import Compress, Packer
from migrate.plan import NEED_CONSENT, WantedMode, choose, choose_mode
from migrate.precopy import Budget
from migrate.probing import Probing, probe_words
from migrate.reconnect import Line
from migrate.recover import recover
from migrate.report import MoveReport, Outcome, Versions
from migrate.reports import ReportStore
from migrate.segment import GRACE_S, WantedNetwork, find_way
from migrate.session import package_version
from migrate.source import FIRST_EPOCH, SourceMove
from migrate.survey import measure_rate_Bps, survey
from migrate.undo import OnUnhealthy, WayBack, with_a_way_back
from runtime.api import Container, Status
from runtime.connections import TcpPolicy
from runtime.container import Containers
from runtime.criu.binary import CriuBinary, find_criu
from runtime.errors import BadInput, RuntimeFault, WrongState
from runtime.host import HostConfig, must_be_writable
from runtime.wire import WireSpec
from transport.api import ChannelClosed, Deadline, Frame, TransportError
from transport.pacing import PacedChannel, TokenBucket

UNDO_TIMEOUT_S = 15.0
MEASURED_S = 0.1
"""The link is measured with no more than a limit on bandwidth lets through in so long."""
BURST_S = 0.05
"""A limit on bandwidth is kept on average over so long."""
LINK_CODES = ("channel-closed", "deadline", "transport", "connect")
"""Causes of a rollback that leave open whether the target knows of it."""


@dataclass(frozen=True, kw_only=True)
class MoveOptions:
    """What the operator asked for. ``timeout_s`` bounds connecting and greeting; ``bandwidth_Bps`` what is sent before
    the blackout, and the rest of a post-copy after it."""

    mode: WantedMode = "auto"
    transport: Literal["auto", "ssh", "stream"] = "auto"
    direct: bool = True
    """Over SSH: a connection of its own for the move, where the target can be reached by one."""
    dry_run: bool = False
    budget: Budget = field(default_factory=Budget)
    bandwidth_Bps: float | None = None
    compress: Compress = "auto"
    allow_postcopy: bool = False
    tcp: TcpPolicy = "auto"
    network: WantedNetwork = "auto"
    grace_s: int = GRACE_S
    """How long an idle wire, and published ports at this host, lead to the container."""
    verify: bool = False
    """Compare all memory on both sides before anything runs on the target."""
    max_blackout_ms: float | None = None
    """The container runs again on the source after so long, unless COMMIT is on the disk; None: no limit."""
    health: HealthCheck | None = None
    """Run in the container once it is on the target."""
    on_unhealthy: OnUnhealthy = "report"
    """``return``: the copy here is kept until the health command has ended, and taken back where that failed. What the
    container did on the target is lost then."""
    undo_window_s: float = 0.0
    """The copy here is kept frozen for so long after the move: undo.undo takes it back."""
    timeout_s: float = 20.0
    reconnect_s: float = 30.0
    """How long a link that breaks before the freeze is tried again, and an answer that is due after COMMIT; 0: not."""
    probe: str = ""
    """What a probe on this host asks meanwhile: an address as probing.py knows it, ``auto``, or nothing."""


def check_consent(options: MoveOptions) -> None:
    """Raises BadInput for a mode in which a host's death loses the container, unless the operator allows that."""
    mode = options.mode if options.mode in NEED_CONSENT else options.budget.on_timeout
    if mode in NEED_CONSENT and not options.allow_postcopy:
        raise BadInput(
            f"in mode {mode} the death of either host, or a link that stays away, loses the container, from the switch "
            "until all of its memory has arrived",
            hint="add --allow-postcopy if that is acceptable, or use --mode precopy",
        )


def check_window(options: MoveOptions) -> None:
    """Raises BadInput for what can not be meant."""
    if options.on_unhealthy == "return" and options.health is None:
        raise BadInput(
            "nothing tells whether the container is unhealthy", hint="give --health-cmd as well, or use --undo-window"
        )


def move(
    host: HostConfig,
    reference: str,
    to: str,
    options: MoveOptions,
    observer: Observer,
    connecting: Callable[..., Session] = connect,
) -> MoveReport:
    """Move a container to another host; with ``dry_run`` only the checks.

    Returns the report, which is kept, with outcome ``migrated`` (or ``refused`` and no error for a dry run that found
    nothing wrong: nothing was moved). Otherwise raises MoveRefused, RolledBack, InDoubt or what failed before anything
    began; the report of that is kept, and shown to ``observer``, as well. Raises MemoryDiffers for pages that
    ``verify`` found to be wrong after the switch: the container runs on the target then.

    ``connecting`` opens the session, as ``links.connect`` does.
    """
    check_consent(options)
    check_window(options)
    must_be_writable(host)
    for line in recover(host):
        observer.on_event(Warning(what=line))
    containers = Containers(host)
    container = containers.get(reference)
    course = Course(
        move_id=secrets.token_hex(6),
        container=container.name,
        source=host.name,
        target=to,
        mode=options.mode,
    )
    held = Held(observer)
    try:
        with containers.locked(container.id, f"move to {to}", wait_s=0.5) as locked:
            moving = partial(_move_probed, host, containers, locked, course, options, held, connecting)
            report = with_a_way_back(host, locked.id, moving, _way_back(options), held)
    except BaseException as error:
        name_peer(error, course.target)
        if isinstance(error, RolledBack) and error.cause_code in LINK_CODES and not course.unreachable:
            _undo_there(host, course)
        report = failed_report(course, error)
        if container.state.status in (Status.RUNNING, Status.PAUSED) and course.transport:
            keep_report(host, report, held)
        held.on_event(MoveEnded(report=report))
        raise
    if not options.dry_run:
        if options.health is not None and report.health is None:
            ReportStore(host).try_to_save(report)  # looking may take long
            report = replace(report, health=look_there(host, report, options.health))
        keep_report(host, report, held)
    held.on_event(MoveEnded(report=report))
    if report.error is not None and report.outcome is Outcome.RETURNED:
        raise TakenBack(report.error.what, hint=report.error.hint)
    if report.health is not None and not report.health.healthy:
        raise Unhealthy.seen(report.health.output, report.health.exit_code, report.container, report.target)
    if report.verify is not None and report.verify.differing:
        raise MemoryDiffers.after_the_switch(report.verify.differing, report.target)
    return report


def _undo_there(host: HostConfig, course: Course) -> None:
    """The link broke, or the session at its other end died: a question about the move makes the target undo what that
    session left, now and not before the next move. Nothing depends on it."""
    deadline = Deadline.after(UNDO_TIMEOUT_S)
    question = messages.Ask(move_id=course.move_id, epoch=FIRST_EPOCH)
    with (
        contextlib.suppress(TransportError, MigrateError, RuntimeFault, OSError),
        connect(host, course.target, deadline=deadline) as session,
    ):
        session.channel.send(Frame.control(question.to_message()), deadline=deadline)
        messages.Answer.parse(session.channel.receive(deadline=deadline).message())


def _way_back(options: MoveOptions) -> WayBack:
    if options.dry_run:
        return WayBack()
    return WayBack(undo_window_s=options.undo_window_s, on_unhealthy=options.on_unhealthy, health=options.health)


def _move_probed(
    host: HostConfig,
    containers: Containers,
    container: Container,
    course: Course,
    options: MoveOptions,
    held: Held,
    connecting: Callable[..., Session],
) -> MoveReport:
    if not options.probe or options.dry_run or container.state.status != Status.RUNNING:
        return _move_locked(host, containers, container, course, options, held, connecting)
    with Probing(probe_words(options.probe, container)) as probing:
        report = _move_locked(host, containers, container, course, options, held, connecting)
        seen = probing.finish()
    if seen["failed"] or seen["resets"]:
        held.on_event(Warning(what=f"the probe saw {seen['failed']} failed requests and {seen['resets']} resets"))
    return replace(report, downtime_ms=seen["downtime_ms"])


def _move_locked(
    host: HostConfig,
    containers: Containers,
    container: Container,
    course: Course,
    options: MoveOptions,
    held: Held,
    connecting: Callable[..., Session],
) -> MoveReport:
    if container.state.status != Status.RUNNING:
        hint = "unpause it first" if container.state.status == Status.PAUSED else "only a running container moves"
        raise WrongState(f"container {container.name} is {container.state.status}", hint=hint)
    if course.target == host.name:
        raise BadInput(f"{course.target} is this host", hint="give another host: cmigrate host ls")
    words = {"transport": options.transport, "direct": options.direct}
    with connecting(host, course.target, **words, deadline=Deadline.after(options.timeout_s)) as session:
        course.target, course.transport = session.entry.name, session.transport
        course.direct = session.direct
        for note in session.notes:
            held.on_event(Warning(what=note))
        criu = find_criu()
        course.memory_bytes = containers.cgroup(container.id).stats().memory_bytes or 0
        course.versions = _own_versions(criu.version_text)
        planned = _plan(containers, container, session, course, options)
        held.on_event(_started(course))
        if planned is not None:
            held.on_event(planned)
        check_both(containers, container, session, course, held, options.tcp)
        wire = _find_wire(host, container, session, course, held, options)
        if options.dry_run:
            return report_of(course, Outcome.REFUSED)
        settle_stay(host, container.id)
        line, pace = _line(host, session, course, options, held, connecting)
        with line.channel:
            return _attempts(host, containers, container, line, pace, course, options, held, criu, wire)


def _attempts(
    host: HostConfig,
    containers: Containers,
    container: Container,
    line: Line,
    pace: Pace,
    course: Course,
    options: MoveOptions,
    held: Held,
    criu: CriuBinary,
    wire: WireSpec | None,
) -> MoveReport:
    """One, unless the target loses what it had before the container was frozen."""
    course.began = True
    while True:
        source = SourceMove(
            host,
            container,
            line,
            mode=course.mode,
            move_id=course.move_id,
            criu=criu,
            observer=held,
            budget=replace(options.budget, hybrid=course.mode == "hybrid"),
            verify=options.verify,
            pace=pace,
            make_report=lambda done: moved_report(course, done).to_json(),
            tcp=options.tcp,
            leaving=Leaving(containers, container.spec, wire, held),
            max_blackout_ms=options.max_blackout_ms,
            window=_way_back(options).window,
        )
        try:
            source.run()
            return moved_report(course, source)
        except BaseException as error:
            course.frozen_ms = source.clock.frozen_ms
            # What was measured until then belongs into the report of the failure.
            error.add_note(f"phases: {source.clock.phases(time.monotonic())}")
            if "freeze" in source.clock:
                course.unreachable = line.broken
                raise
            _begin_again(containers, container, line, course, held, options.tcp, error)


def _begin_again(
    containers: Containers,
    container: Container,
    line: Line,
    course: Course,
    held: Held,
    tcp: TcpPolicy,
    error: BaseException,
) -> None:
    """Returns when both hosts have found again that the move can begin; raises ``error`` where it is not to."""
    while True:
        if not line.begin_again(error, course.move_id, FIRST_EPOCH):
            course.unreachable = line.broken
            raise error
        try:
            check_both(containers, container, line.session, course, held, tcp)
        except ChannelClosed as broke:
            error = RolledBack.because(broke)
            error.__cause__ = broke
        else:
            course.move_id = secrets.token_hex(6)
            return


def _own_versions(criu: str) -> Versions:
    python = platform.python_version()
    return Versions(cmigrate=package_version(), criu_source=criu, kernel_source=platform.release(), python=python)


def _find_wire(
    host: HostConfig, container: Container, session: Session, course: Course, held: Held, options: MoveOptions
) -> WireSpec | None:
    way = find_way(host, container.spec, session, options.network, options.grace_s)
    course.network = way.network
    if way.warning:
        held.on_event(Warning(what=way.warning, remedy=way.remedy))
    return way.wire


def _plan(
    containers: Containers, container: Container, session: Session, course: Course, options: MoveOptions
) -> Planned | None:
    """Settle on a mode. Only where there is something to choose, or to show, is anything measured."""
    if options.mode != "auto" and not options.dry_run:
        plan = choose_mode(options.mode)
    else:
        facts = survey(containers, container, session.channel)
        course.link_Bps = facts.rate_Bps
        if options.bandwidth_Bps is not None:
            facts = replace(facts, bandwidth_Bps=options.bandwidth_Bps)
        limit_ms = options.budget.downtime_limit_ms
        plan = choose(options.mode, facts, downtime_limit_ms=limit_ms, allow_postcopy=options.allow_postcopy)
    predictions = plan.predictions
    course.mode, course.why = plan.mode, plan.reason
    course.predicted_ms = next((found.blackout_ms for found in predictions if found.mode == plan.mode), None)
    return Planned(mode=plan.mode, why=plan.reason, predictions=predictions) if predictions else None


def _line(
    host: HostConfig,
    session: Session,
    course: Course,
    options: MoveOptions,
    held: Held,
    connecting: Callable[..., Session],
) -> tuple[Line, Pace]:
    """The session, with a limit on what it sends if there is to be one, and how bulk goes."""
    line = Line(host, session, connecting, held, limit_s=options.reconnect_s)
    packer = Packer(options.compress)
    if options.bandwidth_Bps is None:
        return line, Pace(packer=packer)
    bucket = TokenBucket(rate_Bps=options.bandwidth_Bps, burst_bytes=int(options.bandwidth_Bps * BURST_S))
    if course.link_Bps is None and course.mode == "precopy":
        # The limit ends at the freeze: how much may be left then depends on what the link takes without it.
        course.link_Bps = measure_rate_Bps(session.channel, int(options.bandwidth_Bps * MEASURED_S))
    channel = PacedChannel(line.channel, bucket)
    line.session = replace(line.session, channel=channel)
    return line, Pace(packer=packer, take=bucket.take, lift=channel.lift, switchover_Bps=course.link_Bps)


def _started(course: Course) -> MoveStarted:
    return MoveStarted(
        move_id=course.move_id,
        container=course.container,
        source=course.source,
        target=course.target,
        mode=course.mode,
        transport=course.transport,
    )
