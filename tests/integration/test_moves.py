"""Services move from host to host and back, with every mode over every transport, and notice nothing."""

from collections.abc import Callable

import pytest

from tests.support.lab import TwoHosts, nothing_left_on
from tests.support.services import HttpServer, Nginx, Pipeline, Postgres, Redis, Service, Threads

COMBINATIONS = tuple((mode, way) for mode in ("stopcopy", "diskless", "precopy") for way in ("ssh", "stream"))
# At even places it goes from host1 to host2, at odd ones back. Each service takes one of the two, which together take
# every combination both ways; one service takes both, and has moved twelve times then.
THERE = tuple(COMBINATIONS[n] for n in (0, 1, 2, 3, 4, 5))
BACK = tuple(COMBINATIONS[n] for n in (1, 0, 3, 2, 5, 4))
SERVICES = {
    Redis: (*THERE, *BACK),
    Nginx: THERE,
    HttpServer: BACK,
    Postgres: THERE,
    Pipeline: BACK,
    Threads: THERE,
}
REPORT_FIELDS = {
    "schema", "id", "container", "source", "target", "mode", "transport", "outcome", "blackout_ms", "total_ms",
    "memory_bytes", "sent_bytes", "rounds", "phases", "versions",
}  # fmt: skip

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(("make", "plan"), SERVICES.items(), ids=[make.__name__ for make in SERVICES])
def test_a_service_moves_in_every_way_and_keeps_everything(
    two_hosts: TwoHosts, make: Callable[[], Service], plan: tuple[tuple[str, str], ...]
) -> None:
    service = make()
    with nothing_left_on(two_hosts, "host1", "host2"):
        running = two_hosts.run(service)
        try:
            service.check()
            for number, (mode, transport) in enumerate(plan, 1):
                source, target = running.host, running.other
                try:
                    report = running.move(mode, transport)
                    service.check()
                except BaseException as error:
                    error.add_note(f"move {number} of {len(plan)}: {source} to {target}, {mode} over {transport}")
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
