"""Memory that goes compressed, or slowly, is the same memory."""

from collections.abc import Iterator

import pytest

from tests.support.lab import HOSTS, Running, TwoHosts, nothing_left_on
from tests.support.oracle import Churn

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def churn(two_hosts: TwoHosts) -> Iterator[tuple[Churn, Running]]:
    with nothing_left_on(two_hosts, *HOSTS):
        service = Churn(32)
        container = two_hosts.run(service)
        try:
            yield service, container
        finally:
            service.close()
            container.remove()


def test_packed_memory_is_exact(churn: tuple[Churn, Running]) -> None:
    service, container = churn
    for way, transport, mode in (
        ("lz4", "stream", "precopy"),
        ("zstd", "ssh", "precopy"),
        ("zstd", "stream", "hybrid"),
    ):
        report = container.move(mode, transport, "--compress", way, "--allow-postcopy")
        service.check()
        assert report["packed"][way] > 0


def test_a_fill_after_the_switch_keeps_to_the_bandwidth(churn: tuple[Churn, Running]) -> None:
    service, container = churn
    limits = ("--bandwidth", "8m", "--compress", "none", "--allow-postcopy")
    report = container.move("postcopy", "stream", *limits)
    service.check()
    # The burst is 50 ms of it; what was asked for goes out at once, and the rest waits longer for it.
    assert report["fill"]["ms"] > (report["fill"]["pages_after"] / 8e6 - 1) * 1000
    assert report["fill"]["pages_after"] > 16 << 20
