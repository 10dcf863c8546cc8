"""Every page of programs that know their memory is what it was, whatever the mode."""

import pytest

from tests.support.lab import HOSTS, TwoHosts, nothing_left_on
from tests.support.oracle import Churn, Oracle, Segments, Sharing

MODES = ("stopcopy", "diskless", "precopy")

pytestmark = pytest.mark.timeout(150)


@pytest.mark.parametrize("make", [Sharing, Segments, lambda: Churn(32)], ids=["sharing", "segments", "churn"])
def test_memory_is_exact_after_a_move_in_every_mode(two_hosts: TwoHosts, make: type[Sharing]) -> None:
    service: Oracle = make()
    with nothing_left_on(two_hosts, *HOSTS):
        container = two_hosts.run(service)
        try:
            service.check()
            for mode in MODES:
                report = container.move(mode, "stream")
                service.check()
                assert (report["outcome"], report["mode"]) == ("migrated", mode)
        finally:
            container.remove()
