"""The filter on this kernel: what it answers to a program, and that services start under it."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from runtime.linux import calls
from runtime.seccomp import default_profile

START_S = 20.0

PROBE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    return 0 if libc.syscall(ctypes.c_long(number), *arguments) >= 0 else ctypes.get_errno()
print([call(*arguments) for arguments in CALLS])
"""
# Numbers that are the same on every machine.
IO_URING_SETUP, PIDFD_OPEN, CLONE3, OPEN_TREE, MEMFD_SECRET = 425, 434, 435, 428, 447


def confined(cap_add: frozenset[str] = frozenset()) -> Callable[[], None]:
    profile = default_profile(cap_add)

    def confine() -> None:
        calls.install_seccomp_filter(profile)

    return confine


def run_python(program: str, cap_add: frozenset[str] = frozenset()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-c", program],
        preexec_fn=confined(cap_add),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


def errors_of(made: Sequence[tuple[int, ...]], cap_add: frozenset[str] = frozenset()) -> list[int]:
    done = run_python(PROBE.replace("CALLS", repr(list(made))), cap_add)
    assert done.returncode == 0, done.stderr
    found: list[int] = ast.literal_eval(done.stdout)
    return found


def test_calls_are_refused_absent_or_allowed_as_the_table_says() -> None:
    made = [(IO_URING_SETUP, 0, 0), (CLONE3, 0, 0), (MEMFD_SECRET, 0), (467,), (9999,), (0x40000000 + 39,)]
    assert errors_of(made) == [errno.ENOSYS] * len(made)
    assert errors_of([(OPEN_TREE, -100, 0, 0), (PIDFD_OPEN, os.getpid(), 0)]) == [errno.EPERM, 0]


def test_a_capability_that_is_added_opens_its_calls() -> None:
    (with_admin,) = errors_of([(OPEN_TREE, -100, 0, 0)], frozenset({"SYS_ADMIN"}))
    assert with_admin not in (0, errno.EPERM), "the kernel itself finds the argument wrong"


def test_namespaces_can_not_be_made_but_threads_and_processes_can() -> None:
    program = """
import os, socket, subprocess, threading
from ctypes import CDLL, get_errno
libc = CDLL(None, use_errno=True)
for flag in (0x10000000, 0x20000, 0x40000000):
    assert libc.unshare(flag) == -1 and get_errno() == 1
threading.Thread(target=lambda: print("thread")).start()
print(subprocess.run(["echo", "process"], capture_output=True, text=True).stdout.strip())
for family in (socket.AF_VSOCK, socket.AF_ALG):
    try:
        socket.socket(family, socket.SOCK_STREAM)
    except PermissionError:
        print("refused")
socket.socket(socket.AF_INET6).close()
"""
    done = run_python(program)
    assert (sorted(done.stdout.split()), done.stderr) == (["process", "refused", "refused", "thread"], "")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="int 0x80 is an instruction of x86")
def test_a_call_by_the_32_bit_door_kills_the_process() -> None:
    program = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("b814000000" "cd80" "c3"))  # mov eax, 20 (getpid); int 0x80; ret
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""
    done = run_python(program)
    assert (done.returncode, done.stdout) == (-signal.SIGSYS, "")


# Services


@contextlib.contextmanager
def service(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv, preexec_fn=confined(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(START_S)
            finally:
                process.kill()


def converse(path: Path, question: bytes) -> bytes:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(START_S)
                client.connect(str(path))
                client.sendall(question)
                return client.recv(4096)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def test_redis_serves_and_saves_under_the_filter(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    options = ["--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path), "--save", ""]
    with service("redis-server", *options):
        assert converse(path, b"PING\r\n") == b"+PONG\r\n"
        assert converse(path, b"SET k v\r\n") == b"+OK\r\n"
        assert converse(path, b"SAVE\r\n") == b"+OK\r\n"


def test_nginx_serves_with_two_workers_under_the_filter(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    os.chmod(tmp_path, 0o755)
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; worker_processes 2; pid {tmp_path}/pid; error_log stderr;\n"
        "events { }\n"
        f'http {{ access_log off; server {{ listen unix:{path}; location / {{ return 200 "served\\n"; }} }} }}\n'
    )
    with service("nginx", "-c", str(config), "-e", "stderr"):
        assert converse(path, b"GET / HTTP/1.0\r\n\r\n").endswith(b"served\n")


def test_postgres_makes_its_cluster_and_serves_under_the_filter(tmp_path: Path) -> None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    assert found, "scripts/setup installs PostgreSQL"
    place = Path("/var/tmp") / f"cmigrate-seccomp-{os.getpid()}"
    place.mkdir()
    shutil.chown(place, "postgres", "postgres")
    as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
    try:
        subprocess.run(
            [*as_postgres, str(found[-1] / "initdb"), "-D", str(place / "data"), "--no-sync"],
            preexec_fn=confined(),
            check=True,
            timeout=60,
            capture_output=True,
        )
        options = ["-D", str(place / "data"), "-k", str(place), "-c", "listen_addresses="]
        with service(*as_postgres, str(found[-1] / "postgres"), *options):
            # An SSL request, answered with a single N: no.
            assert converse(place / ".s.PGSQL.5432", bytes.fromhex("0000000804d2162f")) == b"N"
    finally:
        shutil.rmtree(place)
