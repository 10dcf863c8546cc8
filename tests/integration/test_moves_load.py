"""A short scripts/netbench: services under load move, and no client loses a connection or a request."""

from typing import Any

import pytest

from scripts.netbench import measure
from tests.support.lab import HOSTS, TwoHosts, nothing_left_on

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("load", ["redis", "http", "udp"])
def test_under_load_no_connection_breaks_and_no_request_fails(two_hosts: TwoHosts, load: str) -> None:
    lines: list[dict[str, Any]] = []
    with nothing_left_on(two_hosts, *HOSTS):
        seen = measure(two_hosts, load, moves=2, modes=["diskless", "precopy"], transport="stream", tell=lines.append)
    assert (seen["moves"], seen["resets"], seen["broken"]) == (2, 0, 0), lines
    # What is held during a long blackout may be more than a socket's buffer takes at once.
    assert seen["failed"] <= (0 if load != "udp" else 300), lines
