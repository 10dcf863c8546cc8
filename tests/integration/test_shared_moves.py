"""Shared memory in moves: what only the two ends together show."""

import pytest

from migrate.journal import read_one
from tests.support.lab import HOSTS, TwoHosts, nothing_left_on
from tests.support.oracle import Oracle

pytestmark = pytest.mark.timeout(150)

MIB = 1 << 20
SIZE = 48 * MIB
HOLDER = """
import mmap, os, sys, time
memory = mmap.mmap(-1, %d)
for at in range(0, len(memory), 4096):
    memory[at:at + 8] = (at + 1).to_bytes(8, "little")
os.fork()
os.makedirs("/oracle", exist_ok=True)
open("/oracle/ready", "w").close()
while True:
    time.sleep(1)
"""


class Holder(Oracle):
    """Two processes and anonymous memory that they share."""

    def __init__(self) -> None:
        super().__init__("holder", "")

    def command(self, client: object) -> tuple[str, ...]:
        return ("python3", "-I", "-S", "-B", "-c", HOLDER % SIZE)


def test_anonymous_shared_memory_is_taken_as_it_is_and_counted_as_the_containers(two_hosts: TwoHosts) -> None:
    service = Holder()
    with nothing_left_on(two_hosts, *HOSTS):
        container = two_hosts.run(service)
        try:
            for _there_and_back in range(2):
                report = container.move("precopy", "stream", "--verify")
                assert report["outcome"] == "migrated"
                shared = report["shared"]
                assert (shared["segments"], shared["after_bytes"]) == (1, 0)
                assert shared["before_bytes"] >= SIZE
                journals = two_hosts.lab.directory / container.host / "state" / "journal"
                journal = read_one(journals, report["id"], "target")
                assert journal is not None
                assert journal.details_of("RESTORED_HELD") == {"shared_taken": 1}
                (stats,) = two_hosts.lines(container.host, "stats", "holder", "--no-stream", "--json")
                assert stats["memory_bytes"] > SIZE
        finally:
            container.remove()
