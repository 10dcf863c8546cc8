"""What preflight says of a container is what CRIU does with it: each case is judged, then dumped and rolled back."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from migrate.errors import ProtocolViolation
from migrate.preflight import Finding, check_source, source_findings, target_findings
from migrate.preflight.findings import Level
from runtime.api import Container, VolumeMount
from runtime.container import Containers
from runtime.criu.binary import find_criu
from runtime.criu.dump import HeldDump
from runtime.errors import CriuFailed
from runtime.execute import execute
from runtime.specify import new_spec
from tests.support.containers import one_host

READY_TIMEOUT_S = 20.0
PRELUDE = """
import ctypes, os, select, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*arguments)
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result
def zeros(count):
    return ctypes.create_string_buffer(count)
"""
EPILOGUE = "\nopen('/ready', 'w').close()\nwhile True: time.sleep(1000)\n"

CARRIED = {
    "nothing special": "",
    "pipes and events": "r, w = os.pipe(); e = select.epoll(); e.register(r); os.eventfd(0); libc.inotify_init()",
    "memory files": "fd = os.memfd_create('m'); os.write(fd, b'x' * 4096)",
    "a listening and a connected TCP socket": (
        "s = socket.create_server(('127.0.0.1', 99)); c = socket.create_connection(('127.0.0.1', 99)); a = s.accept()"
    ),
    "an IPv6 UDP socket": "s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(('::1', 99))",
    "unix sockets of its own": "a, b = socket.socketpair(); s = socket.socket(socket.AF_UNIX); s.bind('/s')",
    "a unix connection nobody has accepted": (
        "s = socket.socket(socket.AF_UNIX); s.bind('/s'); s.listen()\n"
        "c = socket.socket(socket.AF_UNIX); c.connect('/s')"
    ),
    "a socket on its way in a message": (
        "a, b = socket.socketpair(); c, d = socket.socketpair(); socket.send_fds(a, [b'x'], [d.fileno()]); d.close()"
    ),
    "a deleted file": "f = open('/gone', 'w'); f.write('x' * 100); f.flush(); os.unlink('/gone')",
    "a pseudo terminal of its own": "m, s = os.openpty()",
    "threads and a child": "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\nos.fork()",
    "a zombie": "p = os.fork()\nif p == 0: os._exit(0)\ntime.sleep(0.2)",
}
# check name -> (seccomp, program)
REFUSED = {
    "io_uring": ("unconfined", "call(425, 8, zeros(120))"),
    "kernel-object": ("unconfined", "call(444, ctypes.create_string_buffer(struct.pack('QQ', 1, 0)), 16, 0)"),
    "socket": ("unconfined", "s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)"),
    "namespace": ("unconfined", "p = os.fork()\nif p == 0: assert libc.unshare(0x10000000) == 0\ntime.sleep(0.3)"),
    "traced": ("unconfined", "p = os.fork()\nif p == 0: libc.ptrace(0, 0, 0, 0); time.sleep(1000)\ntime.sleep(0.3)"),
}


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Containers]:
    with one_host("cmpf0", config_dir=tmp_path / "etc", subnet="10.99.0.0/16", gateway="10.99.0.1") as found:
        yield found


def start(containers: Containers, program: str, **fields: Any) -> Container:
    """A container whose Python program has come to its end and sleeps."""
    argv = [os.path.realpath("/usr/bin/python3"), "-I", "-S", "-B", "-c", PRELUDE + program + EPILOGUE]
    container = containers.run(new_spec(containers, argv=argv, name="web1", rootfs="host", **fields))
    ready = containers.store.directory(container.id) / "upper/ready"
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not ready.exists():
        log = containers.log_path("web1")
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "the program does not get ready"
        time.sleep(0.02)
    return containers.get("web1")


def checks(findings: list[Finding], level: Level) -> list[str]:
    return [finding.check for finding in findings if finding.level == level]


def dump_and_roll_back(containers: Containers, container: Container, images: Path) -> None:
    """Raises CriuFailed when CRIU can not dump it; it runs on either way."""
    images.mkdir()
    dump = HeldDump(containers, container, find_criu(), images)
    try:
        dump.prepare()
        dump.freeze()
        dump.dump()
    finally:
        dump.rollback()


@pytest.mark.parametrize("name", CARRIED)
def test_what_criu_carries_is_not_objected_to(name: str, containers: Containers, tmp_path: Path) -> None:
    container = start(containers, CARRIED[name])
    assert checks(source_findings(containers, container), "blocker") == []
    dump_and_roll_back(containers, container, tmp_path / "images")


@pytest.mark.parametrize("check", REFUSED)
def test_what_criu_refuses_is_named_before_anything_freezes(check: str, containers: Containers, tmp_path: Path) -> None:
    seccomp, program = REFUSED[check]
    container = start(containers, program, seccomp=seccomp)
    findings = source_findings(containers, container)
    assert checks(findings, "blocker") == [check]
    (finding,) = (finding for finding in findings if finding.level == "blocker")
    assert "python3" in finding.what
    assert finding.remedy
    if check == "traced":
        return  # CRIU tries for ten seconds before it gives up
    with pytest.raises(CriuFailed):
        dump_and_roll_back(containers, container, tmp_path / "images")


def test_a_unix_socket_to_a_process_outside_names_that_process(containers: Containers, tmp_path: Path) -> None:
    outside = tmp_path / "shared"
    outside.mkdir()
    accepted: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(outside / "s"))
        server.listen()
        thread = threading.Thread(target=lambda: accepted.append(server.accept()[0]))
        thread.start()
        container = start(
            containers,
            "c = socket.socket(socket.AF_UNIX); c.connect('/mnt/s')",
            volumes=(VolumeMount(source=str(outside), destination="/mnt"),),
        )
        thread.join()
        stack.callback(accepted[0].close)
        findings = source_findings(containers, container)
        assert checks(findings, "blocker") == ["unix-socket"]
        assert f"({os.getpid()}) outside" in next(f.what for f in findings if f.check == "unix-socket")
        with pytest.raises(CriuFailed):
            dump_and_roll_back(containers, container, tmp_path / "images")


def test_a_process_that_came_from_outside_is_named(containers: Containers, tmp_path: Path) -> None:
    container = start(containers, "")
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        containers.cgroup(container.id).add(stranger.pid)
        try:
            findings = source_findings(containers, container)
        finally:
            stranger.kill()
    assert "outside-process" in checks(findings, "blocker")


def test_a_paused_container_is_refused_and_told_how_to_go_on(containers: Containers) -> None:
    container = start(containers, "")
    containers.pause(container.id)
    (finding,) = source_findings(containers, containers.get(container.id))
    assert (finding.level, finding.check, finding.remedy) == ("blocker", "state", "cmigrate unpause web1")
    containers.unpause(container.id)


def test_a_program_of_exec_is_a_warning_and_no_obstacle(containers: Containers, tmp_path: Path) -> None:
    container = start(containers, "")
    thread = threading.Thread(target=execute, args=(containers, "web1", ["sh", "-c", "touch /started; sleep 1000"]))
    thread.start()
    started = containers.store.directory(container.id) / "upper/started"
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    findings = source_findings(containers, container)
    dump_and_roll_back(containers, container, tmp_path / "images")
    # The dump ended the waiter; what is left of exec reads the program's output until that ends.
    containers.remove("web1", force=True)
    thread.join(READY_TIMEOUT_S)
    assert checks(findings, "blocker") == []
    assert checks(findings, "warning") == ["exec"]


def test_facts_fit_a_message_and_the_same_host_lacks_nothing_but_a_free_id(containers: Containers) -> None:
    container = start(containers, "x = bytearray(64 << 20)\nopen('/dev/shm/f', 'wb').write(b'x' * (8 << 20))")
    check = check_source(containers, container)
    wire = msgpack.packb(check.facts)
    facts = msgpack.unpackb(wire)
    assert len(wire) < 100_000
    assert 64 << 20 <= facts["memory_bytes"] < 200 << 20
    assert 8 << 20 <= facts["tmpfs_bytes"] < 16 << 20
    paths = {path: build_id for path, _size, _mode, build_id in facts["files"]}
    assert paths[os.path.realpath("/usr/bin/python3")]
    findings = target_findings(containers.host, containers, facts)
    assert checks(findings, "blocker") == ["id"]
    assert "files" in checks(findings, "ok")


def test_looking_costs_little_while_a_container_of_ten_processes_works(containers: Containers) -> None:
    container = start(containers, "for _ in range(8):\n  if os.fork() == 0: break")
    check_source(containers, container)
    begin = time.monotonic()
    check = check_source(containers, container)
    source_s = time.monotonic() - begin
    assert check.facts["processes"] == 10
    begin = time.monotonic()
    target_findings(containers.host, containers, check.facts)
    target_s = time.monotonic() - begin
    # Both take 50 ms; other programs run on this machine too.
    assert source_s < 20
    assert target_s < 20


def test_facts_that_do_not_fit_are_refused_whole(containers: Containers) -> None:
    container = start(containers, "")
    facts = check_source(containers, container).facts
    with pytest.raises(ProtocolViolation):
        target_findings(containers.host, containers, facts | {"memory_bytes": "much"})


def test_another_host_that_lacks_everything_hears_all_of_it_at_once(containers: Containers, tmp_path: Path) -> None:
    port = 18080
    container = start(
        containers,
        "",
        volumes=(VolumeMount(source=str(tmp_path), destination="/mnt"),),
    )
    facts = check_source(containers, container).facts
    spec = container.spec
    assert spec.network is not None
    lacking = dict(spec.to_json())
    lacking |= {
        "id": "f" * 12,
        "volumes": [{"source": "/nowhere/data", "destination": "/mnt", "read_only": False}],
        "ports": [{"host_port": port, "container_port": 80, "protocol": "tcp", "host_address": "0.0.0.0"}],
    }
    files = [["/usr/bin/no-such-program", 1, 0o100755, "00"], *facts["files"]]  # type: ignore[misc]
    with socket.create_server(("0.0.0.0", port)):
        findings = target_findings(
            dataclasses.replace(containers.host, subnet="10.77.0.0/24"),
            containers,
            facts | {"spec": lacking, "files": files, "memory_bytes": 1 << 50, "upper_bytes": 1 << 50},
        )
    assert checks(findings, "blocker") == [
        "memory",
        "disk",
        "name",
        "address",
        "subnet",
        "port",
        "files",
        "volumes",
    ]
    assert all(finding.remedy for finding in findings if finding.level == "blocker")
    assert "/usr/bin/no-such-program is missing" in next(f.what for f in findings if f.check == "files")


def test_another_machine_that_answers_for_the_address_is_found(containers: Containers) -> None:
    container = start(containers, "")
    facts = check_source(containers, container).facts
    spec = container.spec
    assert spec.network is not None
    # The container is still there, but as the facts have it, its MAC is another one.
    stolen = spec.to_json() | {"id": "e" * 12, "name": "other"}
    stolen["network"] = stolen["network"] | {"mac": "02:42:00:00:00:01"}
    findings = target_findings(containers.host, containers, facts | {"spec": stolen})
    taken = [finding.what for finding in findings if finding.check == "address"]
    assert any(spec.network.mac in text for text in taken)
    assert len(taken) == 2
