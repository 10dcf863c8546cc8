"""Control messages of the move protocol: values, their form on the wire, and the checks a peer's bytes must pass.

Every message is a map with a ``type``. ``to_message`` gives that map; ``Class.parse(map)`` and ``parse(map)`` take one
from a peer and raise ProtocolViolation unless every field is there, of its type and within its bounds. A field nobody
knows is ignored, a type nobody knows is refused: the newer side owns compatibility. docs/protocol.md has the order.

Bulk (tree-changes, image, space, pages, log) is announced by maps of its own, see incoming.py and outgoing.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from migrate.errors import MigrateError, MoveRefused, NoCommonProtocol, PeerFailed, describe
from migrate.fields import (
    Connections,
    Count,
    Digests,
    Epoch,
    Facts,
    FindingList,
    Flag,
    Lines,
    ModeName,
    Mounts,
    MoveId,
    Neighbours,
    Pipes,
    ProtocolNumber,
    Shared,
    Spec,
    Standing,
    Text,
    Time,
    Times,
    Versions,
    Wire,
)
from migrate.message import MESSAGES as MESSAGES
from migrate.message import Message as Message
from migrate.message import parse as parse
from migrate.wire import MAX_TEXT, integer

PROTOCOL = OLDEST_PROTOCOL = 2
"""The newest protocol this version speaks, and the oldest."""
HELD_FLAG = 1 << 8
"""Beside CRIU's flags of a run in ``pages``: the target has these pages already, and no data follows for them."""


@dataclass(frozen=True, kw_only=True)
class Hello(Message):
    """The first message of both ends. ``protocol`` is the newest spoken, ``oldest`` the oldest."""

    TYPE: ClassVar[str] = "hello"
    protocol: ProtocolNumber = PROTOCOL
    oldest: ProtocolNumber = OLDEST_PROTOCOL
    version: Text
    host: Text


def negotiate(ours: Hello, theirs: Hello) -> int:
    """The protocol both speak, the newest of them. Raises NoCommonProtocol."""
    common = min(ours.protocol, theirs.protocol)
    if common < max(ours.oldest, theirs.oldest):
        raise NoCommonProtocol(
            f"cmigrate {ours.version} here speaks protocol {ours.oldest} to {ours.protocol}, "
            f"{theirs.version} on {theirs.host} {theirs.oldest} to {theirs.protocol}",
            hint="install the same version on both hosts",
        )
    return common


@dataclass(frozen=True, kw_only=True)
class Preflight(Message):
    """Source asks before anything happens: could you take this container? ``facts`` come from preflight.py."""

    TYPE: ClassVar[str] = "preflight"
    spec: Spec
    mode: ModeName
    memory_bytes: Count = 0
    tree_bytes: Count = 0
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Findings(Message):
    """The target's answer: every finding at once, and its versions for the report."""

    TYPE: ClassVar[str] = "findings"
    findings: FindingList = ()
    versions: Versions = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Offer(Message):
    """Source asks the target to reserve everything. ``way_back`` is the MAC of its bridge, where that translates
    addresses (runtime/wayback.py), ``wire`` leads there from other segments. ``verify``: hashes of pages will come."""

    TYPE: ClassVar[str] = "offer"
    move_id: MoveId
    epoch: Epoch
    mode: ModeName
    spec: Spec
    memory_bytes: Count = 0
    tree_bytes: Count = 0
    facts: Facts = field(default_factory=dict)
    verify: Flag = False
    way_back: Text = ""
    wire: Wire = None
    reconnect_s: Time = 0.0
    """How long the source tries to come back when the link breaks before the freeze; 0: it does not."""


@dataclass(frozen=True, kw_only=True)
class Prepared(Message):
    """Target has reserved room, name, address and sandbox. Bulk may come. ``gives_back``: it knows ``give-back``."""

    TYPE: ClassVar[str] = "prepared"
    move_id: MoveId
    versions: Versions = field(default_factory=dict)
    packing: Lines = ()
    shared: Flag = False  # whether it can take shared memory apart from CRIU's images
    gives_back: Flag = False
    resume: Flag = False
    """The reservation outlives a link that breaks before the freeze, for as long as the offer asked for."""
    refill: Flag = False
    """So does a container that runs here and lacks memory: it outlives a link that breaks after the switch."""


@dataclass(frozen=True, kw_only=True)
class Resume(Message):
    """On a new connection, after the link broke before the freeze, or while memory followed after the switch: the
    source wants to go on where it was."""

    TYPE: ClassVar[str] = "resume"
    move_id: MoveId
    epoch: Epoch


@dataclass(frozen=True, kw_only=True)
class Resumed(Message):
    """The answer: everything is as it was, and ``taken`` is how many bulk messages have come whole, in their order,
    since the offer. What comes next follows the last of them. After the switch of a post-copy ``missing_bytes`` of
    memory are named behind it, which have not come."""

    TYPE: ClassVar[str] = "resumed"
    move_id: MoveId
    taken: Count
    missing_bytes: Count = 0


@dataclass(frozen=True, kw_only=True)
class Reach(Message):
    """Source asks, before it freezes, whether everything so far has come."""

    TYPE: ClassVar[str] = "reach"
    move_id: MoveId


@dataclass(frozen=True, kw_only=True)
class Reached(Message):
    """The answer to it, in its place among what was sent."""

    TYPE: ClassVar[str] = "reached"
    move_id: MoveId


@dataclass(frozen=True, kw_only=True)
class Frozen(Message):
    """The container is frozen on the source; its sockets there still take frames until the target holds them."""

    TYPE: ClassVar[str] = "frozen"
    move_id: MoveId


@dataclass(frozen=True, kw_only=True)
class Holding(Message):
    """The answer: frames for the container come to the target now, and wait."""

    TYPE: ClassVar[str] = "holding"
    move_id: MoveId


@dataclass(frozen=True, kw_only=True)
class FrozenState(Message):
    """The last message before the restore: everything has been sent. ``manifest`` are digests of what must be there.

    ``shared`` is not in CRIU's images; ``shared_follows``: what changed of it last comes behind this message.
    ``unheard``: connections that the container had not accepted, and that end."""

    TYPE: ClassVar[str] = "frozen-state"
    mounts: Mounts
    pipes: Pipes
    started_at: Text = ""
    restarts: Count = 0
    manifest: Digests = field(default_factory=dict)
    neighbours: Neighbours = field(default_factory=dict)
    unheard: Connections = ()
    shared: Shared = ()
    shared_follows: Flag = False


@dataclass(frozen=True, kw_only=True)
class Verified(Message):
    """Target has restored and compared so many pages with the source's hashes: all are the same.

    ``later`` are still on the source and are compared when they arrive. ``ms`` is what comparing took.
    """

    TYPE: ClassVar[str] = "verified"
    move_id: MoveId
    pages: Count
    ms: Time
    later: Count = 0


@dataclass(frozen=True, kw_only=True)
class Ready(Message):
    """Target has restored up to the last moment before an instruction runs, and journaled that."""

    TYPE: ClassVar[str] = "ready"
    move_id: MoveId
    epoch: Epoch


@dataclass(frozen=True, kw_only=True)
class Commit(Message):
    """Source has COMMITTED on its disk: the right to run passes to the target."""

    TYPE: ClassVar[str] = "commit"
    move_id: MoveId
    epoch: Epoch


@dataclass(frozen=True, kw_only=True)
class Running(Message):
    """Target has COMMIT on its disk and the container runs. ``marks_ms`` are durations on the target's clock."""

    TYPE: ClassVar[str] = "running"
    move_id: MoveId
    epoch: Epoch
    marks_ms: Times = field(default_factory=dict)
    lazy: Flag = False


@dataclass(frozen=True, kw_only=True)
class Want(Message):
    """Post-copy: somebody on the target waits for this page of the task with this pid inside; the source sends it."""

    TYPE: ClassVar[str] = "want"
    id: Annotated[int, integer(1, 2**31 - 1)]
    address: Annotated[int, integer(0, 2**57 - 1)]


@dataclass(frozen=True, kw_only=True)
class Whole(Message):
    """Post-copy: the target needs nothing of the source's memory any more; the source may throw its copy away."""

    TYPE: ClassVar[str] = "whole"
    move_id: MoveId


@dataclass(frozen=True, kw_only=True)
class Complete(Message):
    """After DONE: all memory is in place and all files are on the target's disk; the source need keep nothing.

    ``fill_ms`` is 0 after an eager restore; ``faults`` had to be answered while the container ran, ``remote_faults`` by
    the source. ``longest_wait_ms`` is of one fault. ``verified_pages`` were compared when they arrived, and
    ``differing_pages`` of them were not what they had been on the source.
    """

    TYPE: ClassVar[str] = "complete"
    move_id: MoveId
    fill_ms: Time
    filled_bytes: Count = 0
    faults: Count = 0
    remote_faults: Count = 0
    longest_wait_ms: Time = 0.0
    verified_pages: Count = 0
    differing_pages: Count = 0


@dataclass(frozen=True, kw_only=True)
class Done(Message):
    """Source has thrown its copy away; the target need keep nothing for it. ``report`` is to be kept there as well."""

    TYPE: ClassVar[str] = "done"
    move_id: MoveId
    epoch: Epoch
    report: Facts = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Discard(Message):
    """Source has rolled back before COMMIT: the target must undo everything."""

    TYPE: ClassVar[str] = "discard"
    move_id: MoveId
    epoch: Epoch
    why: Text = ""


@dataclass(frozen=True, kw_only=True)
class Refused(Message):
    """Target has REFUSED on its disk: it will never run this move. ``blockers`` when preflight is why."""

    TYPE: ClassVar[str] = "refused"
    move_id: MoveId
    epoch: Epoch
    why: Text = ""
    blockers: FindingList = ()

    def as_error(self) -> MoveRefused:
        return MoveRefused(f"the target refused: {self.why}" if self.why else "refused", blockers=self.blockers)


@dataclass(frozen=True, kw_only=True)
class Error(Message):
    """Something failed at the peer. ``code`` is a name of errors.CODES."""

    TYPE: ClassVar[str] = "error"
    code: Text
    what: Text
    hint: Text = ""
    log_lines: Lines = ()
    blockers: FindingList = ()

    @classmethod
    def of(cls, error: BaseException) -> Error:
        told = describe(error)
        return cls(
            code=told.code,
            what=told.what[:MAX_TEXT],
            hint=told.hint[:MAX_TEXT],
            log_lines=tuple(line[:MAX_TEXT] for line in told.log_lines[:64]),
            blockers=told.blockers[:256],
        )

    def as_error(self) -> MigrateError:
        if self.blockers:
            return MoveRefused(self.what, hint=self.hint, blockers=self.blockers)
        return PeerFailed(self.what, hint=self.hint, code=self.code, log_lines=self.log_lines)


@dataclass(frozen=True, kw_only=True)
class Ask(Message):
    """Source is in doubt: where does (move_id, epoch) stand? The answer depends on these two alone."""

    TYPE: ClassVar[str] = "ask"
    move_id: MoveId
    epoch: Epoch


@dataclass(frozen=True, kw_only=True)
class Answer(Message):
    """``held``: send COMMIT again. ``committed``: COMMIT is on this disk, running will follow. ``refused``: reclaim.
    ``lost``: it ran here and was killed, because memory did not arrive that it could not live without. ``returned``:
    it ran here and was killed to be given back; ``settled``: it will not be given back.
    """

    TYPE: ClassVar[str] = "answer"
    move_id: MoveId
    epoch: Epoch
    state: Standing


BULK_TYPES = ("tree-changes", "images", "space", "pages", "memory", "shared", "remote", "hashes", "log")
MESSAGES.update(
    {
        kind.TYPE: kind
        for kind in (
            Hello,
            Preflight,
            Findings,
            Offer,
            Prepared,
            Resume,
            Resumed,
            Reach,
            Reached,
            Frozen,
            Holding,
            FrozenState,
            Verified,
            Ready,
            Commit,
            Running,
            Want,
            Whole,
            Complete,
            Done,
            Discard,
            Refused,
            Error,
            Ask,
            Answer,
        )
    }
)
