"""Chooses how to move: predicts blackout, total time and traffic of every mode from measured facts. Pure.

A prediction is arithmetic on what was measured: fixed costs, the link's rate, the curve of dirty memory. It says what
it rests on, and ``choose`` says why a mode was taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from migrate.costs import GIB, DirtyCurve, FixedCosts, round_pays
from runtime.errors import BadInput

ModeName: TypeAlias = Literal["stopcopy", "diskless", "precopy", "postcopy", "hybrid"]
WantedMode: TypeAlias = Literal["auto", "stopcopy", "diskless", "precopy", "postcopy", "hybrid"]
TransportName: TypeAlias = Literal["auto", "ssh", "stream"]

MODES: tuple[ModeName, ...] = get_args(ModeName)
# In these either host's death loses the container for a while: --allow-postcopy.
NEED_CONSENT: tuple[ModeName, ...] = ("postcopy", "hybrid")
_MAX_ROUNDS = 30
# Modes whose blackouts differ by less than these are as good as each other.
_SAME_SHARE, _SAME_MS = 0.1, 5.0


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Of these hosts, in memory bytes a second. The defaults are of a small machine with two cores.

    ``dump_Bps``: CRIU through our page server, everything sent. ``restore_Bps``: CRIU reading images into memory.
    ``disk_Bps``: image files written and read back. ``frozen_s_per_GiB``: what the blackout costs for memory that is
    not sent in it, because CRIU looks at each page's state.
    """

    dump_Bps: float = 1.5e9
    restore_Bps: float = 1.0e9
    disk_Bps: float = 0.5e9
    frozen_s_per_GiB: float = 0.02


@dataclass(frozen=True, kw_only=True)
class MoveFacts:
    """What is known before a move. Sizes are of touched memory that is not zero.

    ``memory_bytes`` is private memory; ``shared_bytes`` (shared mappings, memfd) has to go in the blackout in every
    mode; ``files_bytes`` is the root's difference, which goes before it. ``rate_Bps`` is the link's, in memory bytes
    after what compression gains; before the blackout the operator may allow less, ``bandwidth_Bps``. ``lazy_restore``:
    the target fills memory after the container runs. ``setup_ms`` is from the start of the move to the first byte;
    ``wire_share`` what compression leaves of a byte.
    """

    memory_bytes: int
    rate_Bps: float
    curve: DirtyCurve
    shared_bytes: int = 0
    files_bytes: int = 0
    costs: FixedCosts = field(default_factory=FixedCosts)
    speeds: Speeds = field(default_factory=Speeds)
    lazy_restore: bool = True
    setup_ms: float = 300.0
    wire_share: float = 1.0
    bandwidth_Bps: float = math.inf

    def __post_init__(self) -> None:
        if self.rate_Bps <= 0 or self.bandwidth_Bps <= 0:
            raise ValueError("a move needs a link with a rate above zero")

    @property
    def live_Bps(self) -> float:
        """The rate while the container runs here."""
        return min(self.rate_Bps, self.bandwidth_Bps)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one mode. ``total_ms`` is until it runs on the target, ``complete_ms`` until all its memory is there.

    ``converges`` is False where rounds end although more of them would be needed to meet the limit.
    """

    mode: ModeName
    blackout_ms: float
    total_ms: float
    complete_ms: float
    sent_bytes: int
    rounds: int = 0
    converges: bool = True
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done. ``reason`` is told to the operator; ``predictions`` are of every mode, best blackout first."""

    mode: ModeName
    reason: str
    predictions: tuple[Prediction, ...] = ()


def choose_mode(wanted: str) -> Plan:
    """The mode when nothing was measured. Raises BadInput for a mode that there is not."""
    if wanted == "auto":
        return Plan(mode="precopy", reason="nothing was measured, and pre-copy is the least affected by memory size")
    for mode in MODES:
        if wanted == mode:
            return Plan(mode=mode, reason="asked for")
    raise BadInput(f"there is no mode {wanted!r}", hint=f"one of {', '.join(MODES)}, or auto")


def predict(facts: MoveFacts, mode: ModeName, *, downtime_limit_ms: float = 300.0) -> Prediction:
    """What a move in this mode will take."""
    if mode in ("stopcopy", "diskless"):
        return _in_one_go(facts, mode)
    if mode == "postcopy":
        return _postcopy(facts)
    return _in_rounds(facts, mode, downtime_limit_ms)


def predict_all(facts: MoveFacts, *, downtime_limit_ms: float = 300.0) -> tuple[Prediction, ...]:
    """Every mode, best blackout first."""
    found = (predict(facts, mode, downtime_limit_ms=downtime_limit_ms) for mode in MODES)
    return tuple(sorted(found, key=lambda prediction: prediction.blackout_ms))


def choose(wanted: str, facts: MoveFacts, *, downtime_limit_ms: float = 300.0, allow_postcopy: bool = False) -> Plan:
    """The mode for what the operator asked for, and why. Raises BadInput for one there is not, or without consent."""
    predictions = predict_all(facts, downtime_limit_ms=downtime_limit_ms)
    if wanted != "auto":
        plan = choose_mode(wanted)
        if plan.mode in NEED_CONSENT and not allow_postcopy:
            raise BadInput(
                f"in mode {plan.mode} either host's death loses the container until all of its memory has arrived",
                hint="add --allow-postcopy if that is acceptable",
            )
        return replace(plan, predictions=predictions)
    allowed = [found for found in predictions if allow_postcopy or found.mode not in NEED_CONSENT]
    taken, reason = _best(allowed, downtime_limit_ms)
    return Plan(mode=taken.mode, reason=reason, predictions=predictions)


def _best(allowed: Sequence[Prediction], limit_ms: float) -> tuple[Prediction, str]:
    """The mode that risks least among those as good as the best, and why."""
    by_mode = {found.mode: found for found in allowed}
    precopy, diskless = by_mode["precopy"], by_mode["diskless"]
    told = f"a blackout of {precopy.blackout_ms:.0f} ms is predicted"
    if precopy.blackout_ms <= limit_ms:
        if _as_good(diskless.blackout_ms, precopy.blackout_ms):
            return diskless, f"memory is so small that copying it once, in {diskless.blackout_ms:.0f} ms, is as good"
        return precopy, f"{told}, within the limit of {limit_ms:.0f} ms"
    # Less is at risk in the hybrid: most of the memory has arrived before the switch.
    for mode in ("hybrid", "postcopy"):
        later = by_mode.get(mode)
        if later is not None and not _as_good(precopy.blackout_ms, later.blackout_ms):
            return later, (
                f"pre-copy would take {precopy.blackout_ms:.0f} ms, above the limit of {limit_ms:.0f} ms; "
                f"with the rest fetched afterwards it is {later.blackout_ms:.0f} ms"
            )
    shortest = min(allowed, key=lambda found: found.blackout_ms)
    taken = precopy if _as_good(precopy.blackout_ms, shortest.blackout_ms) else shortest
    return taken, f"no mode that is allowed meets {limit_ms:.0f} ms; this one comes nearest: {taken.blackout_ms:.0f} ms"


def _as_good(blackout_ms: float, best_ms: float) -> bool:
    return blackout_ms <= max(best_ms * (1 + _SAME_SHARE), best_ms + _SAME_MS)


def _files_s(facts: MoveFacts) -> float:
    return facts.files_bytes / facts.live_Bps


def _frozen_ms(facts: MoveFacts, *, sent_bytes: float, sending_Bps: float, restored_bytes: float) -> float:
    """A blackout in which so much is sent, and so much of CRIU's restore reads before the first instruction."""
    fixed_ms = facts.costs.blackout_ms(0, facts.rate_Bps)
    walked_ms = facts.memory_bytes / GIB * facts.speeds.frozen_s_per_GiB * 1000
    shared_s = facts.shared_bytes / min(facts.rate_Bps, facts.speeds.dump_Bps)
    restored_s = (restored_bytes + facts.shared_bytes) / facts.speeds.restore_Bps
    return fixed_ms + walked_ms + (sent_bytes / sending_Bps + shared_s + restored_s) * 1000


def _in_one_go(facts: MoveFacts, mode: ModeName) -> Prediction:
    memory = facts.memory_bytes
    speed = min(facts.rate_Bps, facts.speeds.dump_Bps)
    if mode == "stopcopy":
        # Written, sent, written and read: one after the other, each at its own speed.
        speed = 1 / (2 / facts.speeds.disk_Bps + 1 / facts.rate_Bps)
    eager = memory if mode == "stopcopy" or not facts.lazy_restore else 0
    blackout = _frozen_ms(facts, sent_bytes=memory, sending_Bps=speed, restored_bytes=eager)
    total = facts.setup_ms + _files_s(facts) * 1000 + blackout
    why = "all memory is copied while nothing runs"
    return Prediction(
        mode=mode,
        blackout_ms=blackout,
        total_ms=total,
        complete_ms=total,
        sent_bytes=_wire(facts, memory),
        why=why + (", through files on both disks" if mode == "stopcopy" else ""),
    )


def _postcopy(facts: MoveFacts) -> Prediction:
    blackout = _frozen_ms(facts, sent_bytes=0, sending_Bps=facts.rate_Bps, restored_bytes=0)
    total = facts.setup_ms + _files_s(facts) * 1000 + blackout
    return Prediction(
        mode="postcopy",
        blackout_ms=blackout,
        total_ms=total,
        complete_ms=total + facts.memory_bytes / facts.rate_Bps * 1000,
        sent_bytes=_wire(facts, facts.memory_bytes),
        why="all memory is fetched after the switch, what is missing first: slow until then",
    )


def _in_rounds(facts: MoveFacts, mode: ModeName, limit_ms: float) -> Prediction:
    lazily = mode == "hybrid"

    def blackout_ms(left_bytes: float) -> float:
        eager = 0 if lazily or facts.lazy_restore else facts.memory_bytes
        sent = 0.0 if lazily else left_bytes
        return _frozen_ms(facts, sent_bytes=sent, sending_Bps=facts.rate_Bps, restored_bytes=eager)

    seconds, sent, rounds = _files_s(facts), 0.0, 0
    left = float(facts.memory_bytes)
    while True:
        round_s = max(left / facts.live_Bps, facts.costs.round_s)
        after = min(float(facts.memory_bytes), facts.curve.dirty_bytes(round_s + facts.costs.scan_to_freeze_s))
        pays = (
            after <= left / 2
            if lazily
            else round_pays(blackout_ms(left), blackout_ms(after), round_s, limit_ms=limit_ms)
        )
        if rounds and (not pays or rounds >= _MAX_ROUNDS):
            break
        seconds, sent, rounds, left = seconds + round_s, sent + left, rounds + 1, after
    blackout = blackout_ms(left)
    converges = blackout <= limit_ms or left <= facts.rate_Bps * facts.costs.round_s
    total = facts.setup_ms + seconds * 1000 + blackout
    return Prediction(
        mode=mode,
        blackout_ms=blackout,
        total_ms=total,
        complete_ms=total + (left / facts.rate_Bps * 1000 if lazily else 0.0),
        sent_bytes=_wire(facts, sent + left),
        rounds=rounds,
        converges=converges,
        why=f"{rounds} {'round' if rounds == 1 else 'rounds'}, {left / (1 << 20):.1f} MiB left "
        + ("to be fetched afterwards" if lazily else "for the blackout"),
    )


def _wire(facts: MoveFacts, memory_bytes: float) -> int:
    return int((memory_bytes + facts.shared_bytes + facts.files_bytes + facts.costs.state_bytes) * facts.wire_share)
