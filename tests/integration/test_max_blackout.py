"""A target that hangs in the blackout: the source thaws when the limit that the operator set has passed."""

import time

import pytest

from tests.integration.test_bad_input import ROLLED_BACK, fake_peer, move, must_fail, serving
from tests.support.lab import TwoHosts

pytestmark = pytest.mark.timeout(150)

LIMIT_MS = 400.0
# Without a limit the source waits minutes for these peers. The machine may be busy; nothing else is waited for.
MUCH_LESS_MS = 20_000.0


def frozen_ms(hosts: TwoHosts) -> float:
    """Of the newest report."""
    newest = hosts.lines("host1", "history", "--json")
    report = max(newest, key=lambda line: str(line["started_at"]))
    assert report["outcome"] == "rolled_back"
    return float(report["blackout_ms"])


@pytest.mark.parametrize(
    ("behaviour", "mode"), [("holdless", "diskless"), ("unready", "diskless"), ("unready", "stopcopy")]
)
def test_a_target_that_hangs_keeps_nobody_frozen_beyond_the_limit(
    two_hosts: TwoHosts, behaviour: str, mode: str
) -> None:
    with serving(two_hosts), fake_peer(two_hosts, behaviour):
        options = ("--mode", mode, "--transport", "stream", "--max-blackout", f"{LIMIT_MS:g}")
        begin = time.monotonic()
        done = move(two_hosts, "stays", "--to", "host2", *options)
        must_fail(done, ROLLED_BACK, "--max-blackout", "400 ms", "runs on", "hint: ")
        assert time.monotonic() - begin < 60
        assert LIMIT_MS <= frozen_ms(two_hosts) < MUCH_LESS_MS
