"""A small run of `scripts/chaos`: deaths where they hurt most, judged from outside."""

import pytest

from scripts.chaos import Case, line_of, run_cases
from tests.support.lab import TwoHosts

pytestmark = pytest.mark.timeout(400)

# Mode, transport, what dies, and when.
FAULTS = (
    ("diskless", "stream", "agent", "COMMIT_LOGGED"),
    ("stopcopy", "ssh", "both", "RESERVED"),
    ("precopy", "stream", "mover", "COMMITTED"),
    ("precopy", "ssh", "pager", "RESUMED"),
    ("postcopy", "ssh", "sshd", "RESTORED_HELD"),
    ("postcopy", "stream", "agent", "RESUMED"),
    ("precopy", "stream", "both", "RETURNING-there"),
)


def test_whatever_dies_one_copy_goes_on_and_nothing_is_left(two_hosts: TwoHosts) -> None:
    wanted = (
        Case(number=number, mode=mode, transport=transport, fault=fault, moment=moment, delay_s=0.0)
        for number, (mode, transport, fault, moment) in enumerate(FAULTS)
    )
    done = run_cases(two_hosts, wanted, lambda case: print(line_of(case)))
    bad = [f"{line_of(case)}" for case in done if case.problems]
    if bad:
        pytest.fail("\n".join(bad), pytrace=False)
    assert len(done) == len(FAULTS)
