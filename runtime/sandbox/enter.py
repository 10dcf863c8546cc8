"""Runs one more program inside a running container: ``python -I -S -B enter.py FD``, stand-alone, stdlib only.

Its orders are one JSON text on descriptor FD (which closes), the program's stdio are descriptors 0-2.

Three processes: this one enters the namespaces and forks a *waiter* inside the container, which forks the program.
The waiter passes the exit code on and can be killed at any time: the program then belongs to the container's init,
as a checkpoint needs it. Its pid is written to RUN/waiters/ so that a move finds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.linux import calls
from runtime.sandbox import confine, init

EXIT_DETACHED = 125
# User last: from outside root may enter all of them, while after a restore the cgroup namespace is owned by the first
# user namespace and could not be entered from the container's own any more.
NAMESPACE_ORDER = ("cgroup", "ipc", "uts", "net", "pid", "time", "mnt", "user")


def enter_namespaces(pid: int) -> None:
    """Join every namespace of ``pid`` that differs from ours."""
    fds: list[int] = []
    for name in NAMESPACE_ORDER:
        theirs = Path(f"/proc/{pid}/ns/{name}")
        if theirs.exists() and os.readlink(theirs) != os.readlink(f"/proc/self/ns/{name}"):
            fds.append(os.open(theirs, os.O_RDONLY | os.O_CLOEXEC))
    for fd in fds:
        calls.setns(fd)
        os.close(fd)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def use_null_stdio() -> None:
    """The container's own /dev/null: a descriptor of the host's could not be dumped."""
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)


def kill_after(program: int, timeout_s: float) -> None:
    """The program leads a session of its own: what it has started in it ends as well."""

    def kill(_number: int, _frame: FrameType | None) -> None:
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                end(program, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)


def run_waiter(orders: dict[str, Any], up: socket.socket) -> None:
    """In the container's pid namespace: start the program, say its exit code as "done N", or "exit N TEXT"."""
    program = os.fork()
    if program == 0:
        try:
            os.setsid()
            if orders["detach"]:
                use_null_stdio()
            init.run_program(orders["spec"], orders, up)
        finally:
            os._exit(confine.EXIT_NOT_EXECUTABLE)
    use_null_stdio()
    if orders.get("timeout_s"):
        kill_after(program, orders["timeout_s"])
    _pid, status = os.waitpid(program, 0)
    code = os.waitstatus_to_exitcode(status)
    up.send(f"done {128 - code if code < 0 else code}".encode())


def wait_for(up: socket.socket) -> int:
    """The program's exit code; why there is none is said on stderr."""
    failure = None
    while True:
        word, _, rest = up.recv(4096).decode().partition(" ")
        if word == "done":
            return int(rest) if failure is None else failure
        if word == "exit":
            code, _, text = rest.partition(" ")
            failure = int(code)
            sys.stderr.write(f"error: {text}\n")
        else:
            sys.stderr.write("error: the container was moved, checkpointed or stopped; the program is no longer ours\n")
            return EXIT_DETACHED if failure is None else failure


def main() -> int:
    with open(int(sys.argv[1]), "rb") as file:
        orders: dict[str, Any] = json.loads(file.read())
    init.join_cgroups(orders["cgroup_paths"])
    waiters = os.open(orders["waiters"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    enter_namespaces(int(orders["init_pid"]))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    waiter = os.fork()
    if waiter == 0:
        try:
            ours.close()
            run_waiter(orders, theirs)
        finally:
            os._exit(1)
    theirs.close()
    os.close(os.open(str(waiter), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=waiters))

    def forward(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(waiter, signal.SIGKILL)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, forward)
    if orders["detach"]:
        return 0
    try:
        return wait_for(ours)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(str(waiter), dir_fd=waiters)


if __name__ == "__main__":
    sys.exit(main())
