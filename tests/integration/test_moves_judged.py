"""Services under load that judge by themselves: digests, sums, integrity checks (scripts/oracle has the long runs)."""

from collections.abc import Callable

import pytest

from tests.support.lab import HOSTS, TwoHosts, nothing_left_on
from tests.support.loads import LoadedPostgres, LoadedRedis, SqliteWal
from tests.support.services import Service

SMALL: dict[str, Callable[[], Service]] = {
    "redis": lambda: LoadedRedis(20_000),
    "postgres": lambda: LoadedPostgres(1, "16MB"),
    "sqlite": SqliteWal,
}

pytestmark = pytest.mark.timeout(150)


@pytest.mark.parametrize("name", SMALL)
def test_a_loaded_service_loses_nothing(two_hosts: TwoHosts, name: str) -> None:
    service = SMALL[name]()
    with nothing_left_on(two_hosts, *HOSTS):
        container = two_hosts.run(service)
        try:
            service.check()
            for mode in ("precopy", "postcopy"):
                report = container.move(mode, "stream", "--allow-postcopy")
                service.check()
                assert (report["outcome"], report["mode"]) == ("migrated", mode)
        finally:
            service.close()
            container.remove()
