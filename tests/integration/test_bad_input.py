"""Whatever is wrong, or goes wrong on the way: the documented exit code, a clear error, the container alive on the
source and serving over the connection it had, and nothing left on the target."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from migrate.serve import SESSION_COMM
from tests.support.lab import HOSTS, TOP, Running, TwoHosts, nothing_left_on, slow_link
from tests.support.services import Memory

NOT_FOUND, REFUSED, ROLLED_BACK, CONNECTION, NO_ROOM, INTERRUPTED = 3, 4, 5, 7, 9, 130
MEMORY_MIB = 64
MOVE_TIMEOUT_S = 100.0

pytestmark = pytest.mark.timeout(150)


@contextmanager
def serving(hosts: TwoHosts, *, mib: int = MEMORY_MIB, options: tuple[str, ...] = ()) -> Iterator[Running]:
    """A container on host1 that must be there, serving, with its memory as it was, when the block ends."""
    service = Memory(mib=mib)
    with nothing_left_on(hosts, *HOSTS):
        container = hosts.run(service, *options, name="stays")
        try:
            service.check()
            with staying(hosts, service, container):
                yield container
        finally:
            service.close()
            container.remove()


@contextmanager
def staying(hosts: TwoHosts, service: Memory, container: Running) -> Iterator[None]:
    with nothing_left_on(hosts, "host2"):
        yield
    assert container.inspect()["state"]["status"] == "running"
    service.check()
    names = [line["name"] for line in hosts.lines("host2", "ps", "-a", "--json")]
    assert container.name not in names


@pytest.fixture(scope="module")
def standing(two_hosts: TwoHosts) -> Iterator[tuple[Memory, Running]]:
    service = Memory(mib=MEMORY_MIB)
    with nothing_left_on(two_hosts, *HOSTS):
        container = two_hosts.run(service, name="shared")
        try:
            service.check()
            yield service, container
        finally:
            service.close()
            container.remove()


@pytest.fixture
def shared(two_hosts: TwoHosts, standing: tuple[Memory, Running]) -> Iterator[Running]:
    """As ``serving``: one container for all tests in which no move of it gets as far as to touch it."""
    with staying(two_hosts, *standing):
        yield standing[1]


def move(hosts: TwoHosts, *arguments: str) -> subprocess.CompletedProcess[str]:
    return hosts.cmigrate("host1", "move", *arguments, check=False, timeout_s=MOVE_TIMEOUT_S)


def must_fail(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The exit code, and an error for people that holds every one of ``words``."""
    assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_an_unknown_container_is_named_and_nothing_happens(two_hosts: TwoHosts, shared: Running) -> None:
    must_fail(move(two_hosts, "share", "--to", "host2"), NOT_FOUND, "share", "hint: ")


def test_an_unknown_host_is_named_and_known_ones_are_told(two_hosts: TwoHosts, shared: Running) -> None:
    must_fail(move(two_hosts, shared.name, "--to", "host7"), NOT_FOUND, "host7", "host2")


def test_a_move_to_the_host_itself_is_refused(two_hosts: TwoHosts, shared: Running) -> None:
    done = move(two_hosts, shared.name, "--to", "host1")
    assert done.returncode in (2, 3, 4), done.stderr
    assert "host1" in done.stderr


def test_a_name_that_is_taken_on_the_target_is_a_blocker(two_hosts: TwoHosts) -> None:
    with nothing_left_on(two_hosts, "host2"):
        two_hosts.cmigrate("host2", "run", "-d", "--name", "stays", "--rootfs", "host", "--", "sleep", "1000")
        other = json.loads(two_hosts.cmigrate("host2", "inspect", "stays").stdout)["spec"]["id"]
        try:
            with nothing_left_on(two_hosts, "host2"):
                two_hosts.cmigrate("host1", "run", "-d", "--name", "stays", "--rootfs", "host", "--", "sleep", "1000")
                try:
                    must_fail(move(two_hosts, "stays", "--to", "host2"), REFUSED, "stays")
                    state = json.loads(two_hosts.cmigrate("host1", "inspect", "stays").stdout)["state"]
                    assert state["status"] == "running"
                finally:
                    two_hosts.cmigrate("host1", "rm", "-f", "stays")
            assert json.loads(two_hosts.cmigrate("host2", "inspect", "stays").stdout)["spec"]["id"] == other
        finally:
            two_hosts.cmigrate("host2", "rm", "-f", "stays")


def test_a_dry_run_moves_nothing_and_tells_blockers(two_hosts: TwoHosts, shared: Running) -> None:
    assert move(two_hosts, shared.name, "--to", "host2", "--dry-run").returncode == 0


@contextmanager
def small_disk(hosts: TwoHosts, mib: int) -> Iterator[Path]:
    """host2's state directory on a file system of this size; its place as seen from host2."""
    state = hosts.config("host2").state_dir
    hosts.lab.exec("host2", ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "small", str(state)], check=True)
    try:
        yield state
    finally:
        hosts.lab.exec("host2", ["umount", str(state)], check=True)


@pytest.mark.parametrize("mode", ["stopcopy", "diskless"])
def test_a_target_without_room_for_the_files_is_a_blocker(two_hosts: TwoHosts, mode: str) -> None:
    with serving(two_hosts) as container:
        container.exec("sh", "-c", "head -c 100000000 /dev/zero | tr '\\0' x >/var/tmp/large")
        with small_disk(two_hosts, 40):
            done = move(two_hosts, "stays", "--to", "host2", "--mode", mode)
            assert done.returncode in (REFUSED, NO_ROOM), done.stderr
            assert "free" in done.stderr
            assert "/var/lib/cmigrate" in done.stderr


@pytest.mark.parametrize(("mode", "transport"), [("stopcopy", "ssh"), ("diskless", "stream")])
def test_a_disk_that_fills_up_on_the_way_rolls_back(two_hosts: TwoHosts, mode: str, transport: str) -> None:
    with serving(two_hosts) as container, small_disk(two_hosts, 700) as state:
        container.exec("sh", "-c", "head -c 500000000 /dev/urandom >/var/tmp/large")
        with started_move(two_hosts, mode, transport) as going:
            wait_for(lambda: has_arrived(two_hosts, container.id), going)
            with filled_up(root_of(two_hosts, "host2") / state.relative_to("/")):
                must_fail(finish(going), ROLLED_BACK, "room", "host2")


@contextmanager
def filled_up(directory: Path) -> Iterator[None]:
    filler = directory / "filler"
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        yield
    finally:
        filler.unlink()


CHANGE_ENTRY = """
import dataclasses, sys
from migrate.inventory import Inventory
from runtime.host import load_host_config
from transport.identity import create_identity
inventory = Inventory(load_host_config())
entry = inventory.get("host2")
change = {
    "certificate": lambda: {"certificate_pem": create_identity("host2").cert_pem},
    "hostkey": lambda: {"ssh_host_keys": tuple((kind, KEY) for kind, _ in entry.ssh_host_keys)},
    "port": lambda: {"stream_port": int(sys.argv[2])},
}
KEY = "AAAAC3NzaC1lZDI1NTE5AAAAIB" + "q" * 42
inventory.add(dataclasses.replace(entry, **change[sys.argv[1]]()), replace=True)
"""


@contextmanager
def changed_entry(hosts: TwoHosts, *change: str) -> Iterator[None]:
    """host1 knows something else about host2 than is true."""
    file = "/etc/cmigrate/hosts/host2.toml"
    hosts.lab.exec("host1", ["cp", "-p", file, f"{file}.true"], check=True)
    try:
        hosts.lab.exec("host1", [sys.executable, "-c", CHANGE_ENTRY, *change], check=True, cwd=TOP)
        yield
    finally:
        hosts.lab.exec("host1", ["mv", f"{file}.true", file], check=True)


def test_a_wrong_host_key_is_refused_before_anything_is_said(two_hosts: TwoHosts, shared: Running) -> None:
    with changed_entry(two_hosts, "hostkey"):
        done = move(two_hosts, shared.name, "--to", "host2", "--transport", "ssh")
        must_fail(done, CONNECTION, "SHA256:", "host add")


def test_a_wrong_certificate_is_refused_before_anything_is_said(two_hosts: TwoHosts, shared: Running) -> None:
    with changed_entry(two_hosts, "certificate"):
        done = move(two_hosts, shared.name, "--to", "host2", "--transport", "stream")
        must_fail(done, CONNECTION, "SHA256:", "host add")


def test_a_target_where_nobody_listens_is_told_as_such(two_hosts: TwoHosts, shared: Running) -> None:
    with changed_entry(two_hosts, "port", "9"):
        must_fail(move(two_hosts, shared.name, "--to", "host2", "--transport", "stream"), CONNECTION, "port 9")


@contextmanager
def fake_agent(hosts: TwoHosts, behaviour: str) -> Iterator[tuple[str, IO[str]]]:
    """On host2, with its own key, so that it is trusted: the port, and what it says when it has been reached."""
    process = hosts.lab.popen(
        "host2",
        [sys.executable, "-m", "tests.support.fake_peer", behaviour],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=TOP,
    )
    with process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process.stdout
        finally:
            process.kill()


@contextmanager
def fake_peer(hosts: TwoHosts, behaviour: str) -> Iterator[None]:
    """In place of host2's agent."""
    with fake_agent(hosts, behaviour) as (port, _said), changed_entry(hosts, "port", port):
        yield


def is_given_up(hosts: TwoHosts, name: str) -> None:
    begin = time.monotonic()
    must_fail(move(hosts, name, "--to", "host2", "--transport", "stream", "--timeout", "5"), CONNECTION, "host2")
    assert time.monotonic() - begin < 45


def test_a_peer_that_sends_garbage_or_hangs_is_given_up_in_time(two_hosts: TwoHosts, shared: Running) -> None:
    """One that says hello and nothing more has half a minute for its answer. Meanwhile come the others."""
    with (
        serving(two_hosts, mib=16) as waits,
        fake_agent(two_hosts, "stuck") as (port, said),
        ThreadPoolExecutor() as pool,
    ):
        with changed_entry(two_hosts, "port", port):
            waiting = pool.submit(is_given_up, two_hosts, waits.name)
            assert said.readline() == "reached\n"
        for behaviour in ("silent", "mute", "garbage", "leaves", "lies", "long"):
            with fake_peer(two_hosts, behaviour), said_of(behaviour):
                is_given_up(two_hosts, shared.name)
        with said_of("stuck"):
            waiting.result()


@contextmanager
def said_of(behaviour: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"of a peer that is {behaviour}")
        raise


def started_move(
    hosts: TwoHosts, mode: str, transport: str, *options: str
) -> AbstractContextManager["subprocess.Popen[str]"]:
    return hosts.moving("stays", "--mode", mode, "--transport", transport, *options)


def finish(going: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    stdout, stderr = going.communicate(timeout=MOVE_TIMEOUT_S)
    return subprocess.CompletedProcess(going.args, going.returncode, stdout, stderr)


def wait_for(condition: Callable[[], bool], going: subprocess.Popen[str]) -> None:
    """Until it holds while the move still goes on."""
    deadline = time.monotonic() + 30
    while not condition():
        if going.poll() is not None or time.monotonic() > deadline:
            done = finish(going)
            raise AssertionError(f"the move ended too soon: {done.returncode} {done.stdout}{done.stderr}")
        time.sleep(0.005)


def root_of(hosts: TwoHosts, host: str) -> Path:
    """A lab host's file system as seen from here."""
    return Path(f"/proc/{hosts.lab.host(host).holder.pid}/root")


def has_arrived(hosts: TwoHosts, container_id: str) -> bool:
    """The target has begun to make something for the container."""
    state = hosts.config("host2").containers_dir.relative_to("/")
    return (root_of(hosts, "host2") / state / container_id / "upper").exists()


def is_frozen(hosts: TwoHosts, container_id: str) -> bool:
    """The source's tasks are held by the freezer."""
    inside = f"{hosts.config('host1').cgroup_parent}/{container_id}/cgroup.events"
    files = [*Path("/sys/fs/cgroup").glob(inside), *Path("/sys/fs/cgroup").glob(f"*/{inside}")]
    return any("frozen 1" in file.read_text() for file in files)


MOMENTS: dict[str, Callable[[TwoHosts, str], bool]] = {"copying": has_arrived, "frozen": is_frozen}
CASES = [
    ("copying", "diskless", "stream"),
    ("copying", "stopcopy", "ssh"),
    ("frozen", "diskless", "ssh"),
    ("frozen", "stopcopy", "stream"),
]


@contextmanager
def taking_long(hosts: TwoHosts, moment: str) -> Iterator[Running]:
    """To move, at this moment of the move."""
    with serving(hosts, mib=300 if moment == "frozen" else MEMORY_MIB) as container:
        if moment == "copying":
            container.exec("sh", "-c", "head -c 200000000 /dev/urandom >/var/tmp/large")
        yield container


def sessions_on(hosts: TwoHosts, host: str) -> list[int]:
    """Processes of the agent that talk with a peer at the moment: of either transport."""
    lines = [line.split() for line in hosts.picture(host)["process"]]
    return [int(pid) for pid, *words in lines if "--stdio" in words or is_session(int(pid))]


def is_session(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == SESSION_COMM
    return False


@pytest.mark.parametrize(("moment", "mode", "transport"), CASES)
def test_ctrl_c_leaves_the_container_on_the_source(two_hosts: TwoHosts, moment: str, mode: str, transport: str) -> None:
    with taking_long(two_hosts, moment) as container:
        with started_move(two_hosts, mode, transport) as going:
            wait_for(lambda: MOMENTS[moment](two_hosts, container.id), going)
            os.killpg(going.pid, signal.SIGINT)
            done = finish(going)
        assert done.returncode == INTERRUPTED, f"{done.returncode}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr


def test_ctrl_c_with_half_a_frame_on_the_link_does_not_leave_the_target_waiting(two_hosts: TwoHosts) -> None:
    # Nothing can be said on that link any more, and a target whose link breaks waits for the source to come back.
    with serving(two_hosts) as container, slow_link(two_hosts, "host1", 2):
        container.exec("sh", "-c", "head -c 200000000 /dev/urandom >/var/tmp/large")
        with started_move(two_hosts, "diskless", "stream") as going:
            wait_for(lambda: has_arrived(two_hosts, container.id), going)
            time.sleep(1.0)
            os.killpg(going.pid, signal.SIGINT)
            assert finish(going).returncode == INTERRUPTED


@pytest.mark.parametrize(("moment", "mode", "transport"), CASES)
def test_a_target_agent_that_is_killed_in_the_middle_leaves_the_container_on_the_source(
    two_hosts: TwoHosts, moment: str, mode: str, transport: str
) -> None:
    with taking_long(two_hosts, moment) as container:
        # Else it would begin again: test_reconnect.
        with started_move(two_hosts, mode, transport, "--reconnect-for", "0") as going:
            wait_for(lambda: MOMENTS[moment](two_hosts, container.id), going)
            for pid in sessions_on(two_hosts, "host2"):
                os.kill(pid, signal.SIGKILL)
            must_fail(finish(going), ROLLED_BACK, "runs on")
        # What it left is undone by the next session on that host.
        two_hosts.cmigrate("host1", "host", "test", "host2")


def test_a_container_moves_as_ever_after_a_move_that_was_called_off(two_hosts: TwoHosts) -> None:
    with nothing_left_on(two_hosts, *HOSTS):
        service = Memory(mib=100)
        container = two_hosts.run(service, name="stays")
        try:
            for mode, transport in (("diskless", "stream"), ("stopcopy", "ssh")):
                with started_move(two_hosts, mode, transport) as going:
                    wait_for(lambda: is_frozen(two_hosts, container.id), going)
                    os.killpg(going.pid, signal.SIGINT)
                    assert finish(going).returncode == INTERRUPTED
                service.check()
            report: dict[str, Any] = container.move("diskless", "stream")
            assert report["outcome"] == "migrated"
            service.check()
        finally:
            service.close()
            container.remove()
