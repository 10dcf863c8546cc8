"""Over SSH a move takes a direct connection where it gets one, and does without where it does not."""

import subprocess

import pytest

from tests.support.lab import HOSTS, TwoHosts, nothing_left_on
from tests.support.oracle import Churn

pytestmark = pytest.mark.timeout(150)

# Whoever wants in on a port that the kernel chooses hears nothing at all.
FIREWALL = "add table inet closed; add chain inet closed in { type filter hook input priority 0; }; "
FIREWALL += "add rule inet closed in tcp dport 32768-60999 tcp flags & (syn | ack) == syn drop"


def test_over_ssh_a_move_goes_direct_or_says_why_not(two_hosts: TwoHosts) -> None:
    with nothing_left_on(two_hosts, *HOSTS):
        service = Churn(32)
        container = two_hosts.run(service)
        try:
            assert container.move("precopy", "ssh")["direct"]
            service.check()
            nft(two_hosts, FIREWALL)
            try:
                words = (
                    "move",
                    container.name,
                    "--to",
                    container.other,
                    "--transport",
                    "ssh",
                    "--json",
                    "--mode",
                    "precopy",
                )
                told = two_hosts.lines(container.host, *words)
                container.host = container.other
            finally:
                nft(two_hosts, "delete table inet closed")
            service.check()
            assert not told[-1]["direct"]
            assert any("no direct connection" in line["what"] for line in told if line["type"] == "warning")
        finally:
            service.close()
            container.remove()


def nft(hosts: TwoHosts, rules: str) -> None:
    hosts.lab.exec("host1", ["nft", rules], check=True, stdin=subprocess.DEVNULL)
