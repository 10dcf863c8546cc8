"""What a container had before a move it has after it; what a move must not do it does not."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.disk import Written, written_so_far
from tests.support.lab import HOSTS, Probe, Running, TwoHosts, nothing_left_on
from tests.support.services import HttpServer, Memory, Redis, Service

MIB = 1 << 20
WRITER = "i=0; while :; do i=$((i+1)); echo out $i; echo err $i >&2; sleep 0.02; done"

pytestmark = pytest.mark.timeout(120)


@contextmanager
def running(hosts: TwoHosts, service: Service, *options: str, name: str = "") -> Iterator[Running]:
    with nothing_left_on(hosts, *HOSTS):
        container = hosts.run(service, *options, name=name)
        try:
            yield container
        finally:
            service.close()
            container.remove()


class Shell:
    """Some shell script, with nothing to connect to."""

    name = "shell"

    def __init__(self, script: str, *options: str) -> None:
        self.options: tuple[str, ...] = options
        self._script = script

    def command(self, client: object) -> tuple[str, ...]:
        return ("sh", "-c", self._script)

    def open(self, place: object) -> None:
        pass

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_limits_environment_labels_policy_and_name_are_the_same_on_the_target(two_hosts: TwoHosts) -> None:
    options = (
        "--memory", "96m", "--cpus", "0.7", "--pids-limit", "77", "-e", "COLOUR=light blue", "-w", "/var/tmp",
        "--hostname", "inside", "--restart", "on-failure:3", "--label", "team=blue", "--cap-drop", "NET_RAW",
        "-u", "nobody",
    )  # fmt: skip
    with running(two_hosts, Shell("exec sleep 1000", *options), name="kept") as container:
        spec = container.inspect()["spec"]
        seen = container.exec("sh", "-c", "hostname; pwd; id; env | sort; grep Cap /proc/1/status")
        for mode, transport in (("stopcopy", "ssh"), ("diskless", "stream")):
            container.move(mode, transport)
            assert container.inspect()["spec"] == spec
            assert container.exec("sh", "-c", "hostname; pwd; id; env | sort; grep Cap /proc/1/status") == seen
            assert cgroup_limits(two_hosts, container) == {"memory": 96 * MIB, "pids": 77}


def cgroup_limits(hosts: TwoHosts, container: Running) -> dict[str, int]:
    """What the kernel has, not what our files say: from whichever hierarchy has the controller."""
    inside = f"{hosts.config(container.host).cgroup_parent}/{container.id}"
    files = {"memory": ("memory.limit_in_bytes", "memory.max"), "pids": ("pids.max",)}
    return {
        kind: int(path.read_text())
        for kind, names in files.items()
        for name in names
        for tree in ("", "*/")
        for path in Path("/sys/fs/cgroup").glob(f"{tree}{inside}/{name}")
    }


def test_the_log_is_complete_and_in_order_across_moves_and_no_line_comes_twice(two_hosts: TwoHosts) -> None:
    with running(two_hosts, Shell(WRITER), name="writer") as container:
        time.sleep(0.5)
        for mode, transport in (("stopcopy", "stream"), ("diskless", "ssh"), ("diskless", "stream")):
            container.move(mode, transport)
            time.sleep(0.3)
        two_hosts.cmigrate(container.host, "stop", "-t", "1", container.name)
        done = two_hosts.cmigrate(container.host, "logs", container.name)
        for stream, lines in (("out", done.stdout.splitlines()), ("err", done.stderr.splitlines())):
            assert lines == [f"{stream} {n}" for n in range(1, len(lines) + 1)]
            assert len(lines) > 40


def test_the_restart_policy_works_on_the_target(two_hosts: TwoHosts) -> None:
    script = "echo begin; trap 'exit 7' TERM; while :; do sleep 0.1; done"
    with running(two_hosts, Shell(script, "--restart", "always"), name="again") as container:
        container.move("diskless", "stream")
        before = container.inspect()["state"]
        two_hosts.cmigrate(container.host, "kill", "-s", "TERM", container.name)
        deadline = time.monotonic() + 20
        while container.inspect()["state"]["restarts"] != before["restarts"] + 1:
            assert time.monotonic() < deadline, container.inspect()["state"]
            time.sleep(0.2)
        assert container.logs().count("begin") == 2


def test_the_exit_code_of_a_moved_container_is_recorded_on_the_target(two_hosts: TwoHosts) -> None:
    with running(two_hosts, Shell("trap 'exit 7' TERM; while :; do sleep 0.1; done"), name="ends") as container:
        container.move("stopcopy", "ssh")
        two_hosts.cmigrate(container.host, "kill", "-s", "TERM", container.name)
        assert two_hosts.cmigrate(container.host, "wait", container.name).stdout.split() == ["7"]
        assert container.inspect()["state"]["status"] == "exited"


@pytest.mark.parametrize(("mode", "transport"), [("stopcopy", "ssh"), ("diskless", "stream")])
def test_a_client_asking_every_millisecond_loses_nothing_and_keeps_its_connection(
    two_hosts: TwoHosts, mode: str, transport: str
) -> None:
    with running(two_hosts, Redis()) as container:
        probe = Probe(two_hosts.lab, "redis", f"{container.address}:6379")
        try:
            time.sleep(0.3)
            probe.mark()
            report = container.move(mode, transport)
            time.sleep(1.0)
            seen = probe.mark()
        finally:
            total = probe.end()
        assert (seen["failed"], seen["resets"], seen["reconnects"], seen["out_of_sequence"]) == (0, 0, 0, 0)
        assert seen["requests"] > 500
        # What it felt cannot be less than what the container was away, up to the clockwork of both.
        assert seen["downtime_ms"] > report["blackout_ms"] * 0.8 - 5
        assert (total["failed"], total["last"]) == (0, total["requests"])


def test_a_published_port_answers_at_the_host_where_the_container_is(two_hosts: TwoHosts) -> None:
    with running(two_hosts, HttpServer(), "-p", "18080:8000") as container:
        for _ in range(3):
            fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:18080/count', timeout=5).read())"
            two_hosts.lab.exec(container.host, ["/usr/bin/python3", "-c", fetch], check=True, timeout=20)
            container.move("diskless", "stream")


def test_a_program_that_was_exec_d_moves_with_the_container(two_hosts: TwoHosts) -> None:
    with running(two_hosts, Shell("exec sleep 1000"), name="host-of-two") as container:
        script = "i=0; while :; do i=$((i+1)); echo $i >/var/tmp/count; sleep 0.05; done"
        two_hosts.cmigrate(container.host, "exec", "-d", container.name, "sh", "-c", script)
        time.sleep(0.4)
        before = int(container.exec("cat", "/var/tmp/count"))
        container.move("diskless", "ssh")
        time.sleep(0.4)
        assert int(container.exec("sh", "-c", "cat /var/tmp/count")) > before


def test_files_of_every_kind_in_root_and_tmpfs_are_there_after_moves(two_hosts: TwoHosts) -> None:
    make = (
        "set -e; mkdir -p /data/d; cd /data; head -c 300000 /dev/urandom >big; ln big hard; ln -s big soft; "
        "mkfifo pipe; truncate -s 50M sparse; chown 33:44 big; chmod 4711 big; "
        "echo x >/dev/shm/shm; echo y >/scratch/tmp; "
        "rm /usr/share/doc/base-files/README* 2>/dev/null || true; rm -rf /var/lib/dpkg; exec sleep 1000"
    )
    look = (
        "cd /data; stat -c '%n %F %u %g %a %s %h' *; sha256sum big; du -k sparse | cut -f1; readlink soft; "
        "cat /dev/shm/shm /scratch/tmp; ls /var/lib/dpkg 2>&1; [ big -ef hard ] && echo same"
    )
    with running(two_hosts, Shell(make, "--tmpfs", "/scratch"), name="files") as container:
        time.sleep(1)
        before = container.exec("sh", "-c", look)
        assert before.endswith("same\n")
        for mode, transport in (("stopcopy", "stream"), ("diskless", "ssh")):
            container.move(mode, transport)
            assert container.exec("sh", "-c", look) == before


def test_a_program_that_starts_others_all_the_time_moves_at_any_moment(two_hosts: TwoHosts) -> None:
    """A task in vfork() cannot be stopped until its child has gone on, and the child is frozen."""
    script = "while :; do /bin/true; done"
    with running(two_hosts, Shell(f"({script}) & ({script}) & {script}"), name="vforks") as container:
        for _ in range(4):
            report = container.move("diskless", "stream")
            assert report["blackout_ms"] < 30000


def test_both_hosts_keep_the_report(two_hosts: TwoHosts) -> None:
    with running(two_hosts, Shell("exec sleep 1000"), name="reported") as container:
        report = container.move("diskless", "stream")
        for host in HOSTS:
            kept = json.loads(two_hosts.cmigrate(host, "report", report["id"], "--json").stdout)
            assert (kept["id"], kept["outcome"], kept["target"]) == (report["id"], "migrated", "host2")
            assert report["id"] in [line["id"] for line in two_hosts.lines(host, "history", "--json")]


def test_diskless_writes_no_page_to_a_disk_of_either_host(two_hosts: TwoHosts) -> None:
    """Counted for the whole machine, so that no process and no file is forgotten.

    Others write meanwhile: the least of several moves bounds what a move itself writes, because noise only adds. A
    stop-copy with image files of the same memory shows that the counter would have seen it.
    """
    memory_mib = 200
    with running(two_hosts, Memory(mib=memory_mib)) as container:
        moves: list[Written] = []
        for mode, transport in (
            ("diskless", "stream"),
            ("diskless", "ssh"),
            ("diskless", "stream"),
            ("stopcopy", "stream"),
        ):
            before = written_so_far()
            report = container.move(mode, transport)
            assert report["sent_bytes"]["pages"] > memory_mib * MIB
            moves.append(written_so_far() - before)
        *diskless, stopcopy = moves
        assert min(written.to_disks_bytes for written in diskless) < memory_mib * MIB / 10, moves
        assert min(written.dirtied_bytes for written in diskless) < memory_mib * MIB / 10, moves
        assert stopcopy.dirtied_bytes > memory_mib * MIB, moves
