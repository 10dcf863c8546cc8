"""Messages about a container that runs on the target while the source keeps its frozen copy, in case it is to come
back. docs/protocol.md has their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from migrate.fields import Epoch, MoveId
from migrate.messages import Message


@dataclass(frozen=True, kw_only=True)
class Keeping(Message):
    """Instead of DONE: the source has KEEPING on its disk. The target finishes what it has to bring in, and tells it
    with COMPLETE; DONE or GIVE_BACK will come on another connection, or neither."""

    TYPE: ClassVar[str] = "keeping"
    move_id: MoveId
    epoch: Epoch


@dataclass(frozen=True, kw_only=True)
class GiveBack(Message):
    """Source has RETURNING on its disk: the target is to end its copy. Answered by ``answer``: ``returned``, or
    ``settled`` where the container has left the target meanwhile."""

    TYPE: ClassVar[str] = "give-back"
    move_id: MoveId
    epoch: Epoch
