"""``cmigrate doctor``: is this host fit to run, send and receive containers?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from migrate import journal, machine, target_machine
from migrate.preflight.findings import Finding, blocker, named, ok, warning
from migrate.preflight.support import judge_host
from runtime.container import Containers
from runtime.errors import RuntimeFault
from runtime.facts_host import read_host_facts
from runtime.facts_leftovers import Leftover, find_leftovers
from runtime.host import HostConfig

MAX_LEFTOVERS = 20


def doctor(host: HostConfig) -> list[Finding]:
    """All findings, good ones too. Needs root. Tries features in namespaces of their own and leaves nothing behind."""
    found = judge_host(host, read_host_facts(host))
    try:
        containers = Containers(host)
    except RuntimeFault:
        return found  # there are no cgroups at all, which is among the findings
    found += judge_leftovers(find_leftovers(containers))
    found += judge_store(containers.store.warnings)
    found += judge_journals(journal.read_all(host.journal_dir))
    return found


def judge_leftovers(leftovers: Sequence[Leftover]) -> Iterator[Finding]:
    """One warning for each, with the command that removes it."""
    for leftover in leftovers[:MAX_LEFTOVERS]:
        yield warning("leftover", leftover.what, leftover.remedy)
    if len(leftovers) > MAX_LEFTOVERS:
        yield warning("leftover", f"{len(leftovers) - MAX_LEFTOVERS} more", "remove these first, then look again")
    if not leftovers:
        yield ok("leftover", "nothing is left of commands that were broken off")


def judge_store(damaged: Sequence[str]) -> Iterator[Finding]:
    """Containers whose files can not be read."""
    for text in damaged:
        yield warning("store", text, "restore the file from a backup, or remove the container's directory")


def judge_journals(journals: Sequence[journal.MoveJournal]) -> Iterator[Finding]:
    """Moves that have not come to an end, as their last record on this disk says."""
    unfinished = []
    for move in journals:
        if move.damage:
            yield warning("journal", move.damage, "keep the file; cmigrate history shows what became of the move")
            continue
        last = move.records[-1].phase if move.records else ""
        if (move.side, last) in _DOUBTFUL:
            yield blocker(
                "in-doubt",
                f"move {move.move_id} is in doubt: the container's right to run was handed over and not confirmed",
                "start the agents of both hosts, or cmigrate resolve",
            )
        elif last and last not in _ENDED[move.side]:
            unfinished.append(f"{move.move_id} ({move.side}, {last})")
    if unfinished:
        yield warning(
            "journal",
            f"moves under way or broken off: {named(unfinished)}",
            "if none is under way, restart the agent: it finishes or undoes them",
        )


_DOUBTFUL = {("source", str(machine.Phase.COMMITTED)), ("source", str(machine.Phase.IN_DOUBT))}
_ENDED = {
    "source": {str(machine.Phase.DONE), str(machine.Phase.ROLLED_BACK), str(machine.Phase.RECLAIMED)},
    "target": {
        str(target_machine.Phase.RESUMED),
        str(target_machine.Phase.CONFIRMED),
        str(target_machine.Phase.REFUSED),
    },
}
