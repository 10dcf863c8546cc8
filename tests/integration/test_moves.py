"""Services move from host to host and back, twelve times, with every mode over every transport, and notice nothing."""

from collections.abc import Callable

import pytest

from tests.support.lab import TwoHosts, nothing_left_on
from tests.support.services import HttpServer, Nginx, Pipeline, Postgres, Redis, Service, Threads

COMBINATIONS = tuple((mode, way) for mode in ("stopcopy", "diskless", "precopy") for way in ("ssh", "stream"))
# Twelve moves in which every combination goes from host1 to host2 (even places) and from host2 to host1 (odd places).
PLAN = tuple(COMBINATIONS[n] for n in (0, 1, 2, 3, 4, 5, 1, 0, 3, 2, 5, 4))
REPORT_FIELDS = {
    "schema", "id", "container", "source", "target", "mode", "transport", "outcome", "blackout_ms", "total_ms",
    "memory_bytes", "sent_bytes", "rounds", "phases", "versions",
}  # fmt: skip

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("make", [Redis, Nginx, HttpServer, Postgres, Pipeline, Threads])
def test_a_service_moves_twelve_times_and_keeps_everything(two_hosts: TwoHosts, make: Callable[[], Service]) -> None:
    service = make()
    with nothing_left_on(two_hosts, "host1", "host2"):
        running = two_hosts.run(service)
        try:
            service.check()
            for number, (mode, transport) in enumerate(PLAN, 1):
                source, target = running.host, running.other
                try:
                    report = running.move(mode, transport)
                    service.check()
                except BaseException as error:
                    error.add_note(f"move {number} of {len(PLAN)}: {source} to {target}, {mode} over {transport}")
                    raise
                assert set(report) >= REPORT_FIELDS
                assert (report["outcome"], report["mode"], report["transport"]) == ("migrated", mode, transport)
                assert (report["source"], report["target"]) == (source, target)
                assert 0 < report["blackout_ms"] < report["total_ms"]
                names = [line["name"] for line in two_hosts.lines(source, "ps", "-a", "--json")]
                assert running.name not in names
            if isinstance(service, Redis):
                two_hosts.cmigrate(running.host, "restart", running.name)
                service.check_after_restart(running)
        finally:
            service.close()
            running.remove()
