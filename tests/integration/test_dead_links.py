"""A link that ends without a word, as a pulled cable does: what makes either side notice."""

import re
import subprocess
import sys
import time

import pytest

from migrate.lab.plan import SSH_PORT
from tests.support.lab import TOP, TwoHosts
from transport.tcp import KEEPALIVE_IDLE_S

pytestmark = pytest.mark.timeout(120)

CALLER = """
from migrate.links import connect
from runtime.host import load_host_config
from transport.api import Deadline
with connect(load_host_config(), "host2", transport="ssh", deadline=Deadline.after(40)):
    print("connected", flush=True)
    input()
"""


def timer_of_session(hosts: TwoHosts) -> tuple[str, float]:
    """Kind of what the kernel waits for on the one connection of host2's SSH server, and for how many seconds."""
    argv = ["ss", "-H", "-t", "-n", "-o", "state", "established", "sport", "=", f":{SSH_PORT}"]
    done = hosts.lab.exec("host2", argv, stdout=subprocess.PIPE, text=True, timeout=20)
    found = re.findall(r"timer:\((\w+),([0-9.]+)(ms|sec|min)", done.stdout)
    if not found:
        return "", 0.0
    ((kind, number, unit),) = found
    return kind, float(number) * {"ms": 0.001, "sec": 1, "min": 60}[unit]


def test_an_ssh_server_asks_soon_whether_the_caller_of_its_session_is_there(two_hosts: TwoHosts) -> None:
    """By itself it does so after two hours. The kernel does it, so that nothing has to wait for half a minute here."""
    caller = two_hosts.lab.popen(
        "host1", [sys.executable, "-c", CALLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TOP
    )
    with caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "connected\n"
        deadline = time.monotonic() + 60
        while (timer := timer_of_session(two_hosts))[0] != "keepalive":  # what was sent last is not acknowledged yet
            assert time.monotonic() < deadline, timer
            time.sleep(0.05)
        caller.communicate("\n", timeout=60)
    assert caller.returncode == 0
    assert timer[1] <= KEEPALIVE_IDLE_S
