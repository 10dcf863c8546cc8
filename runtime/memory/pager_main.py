"""The pager of one container: a stand-alone program, ``python -I -S -B pager_main.py FD``. Stdlib only, two processes.

The *pager* fills restored memory from the stores; the *guard*, its parent, only waits. The guard has a copy of every
userfaultfd, so that the kernel does not hand out zeros when the pager dies: who faults then waits, until the guard has
killed the container. Both ignore every signal that can be ignored, and neither ends with who started it.

FD is one end of a SOCK_SEQPACKET pair: JSON datagrams, descriptors by SCM_RIGHTS.
  caller: {"op": "guard", "cgroups", "record"}              what to kill, and in which file to note that
          {"op": "space", "vpid", "spans", "hot"} + [store, plan]
                                              plan: pairs of u64 (start, end): so many spans, so many hot ones, and
                                              what is not in the store yet
          {"op": "listen"} + [directory]      lazy-pages.socket is there when "listening" is answered
          {"op": "fill"}                      the restore is at its end, held or over: begin to fill
          {"op": "arrived", "vpid", "runs"}   offset, size, ...: this is in the store now
          {"op": "lose", "why"}               nothing will arrive any more: die if anything is missing
          {"op": "count"}                     -> {"event": "counters", ...}
          {"op": "abandon"}                   the restore is given up, its tasks are dead: end
  pager:  {"event": "ready", "pid"}, "listening", "connected", "resumed", then "filled" with counters, and it ends
          {"event": "want", "vpid", "offset"} somebody waits for a page that is not in the store yet
  guard:  {"event": "died", "what", "never_ran"}: the pager is dead, and so is the container; "never_ran" when CRIU had
          not told the pager that the restore is finished, which it does before it lets a task go
The caller closing FD before CRIU has connected ends the pager; afterwards nobody needs to be there, and it fills
without being told, unless something has not arrived yet: then that is the end of the container.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.linux import faults
from runtime.memory.pager_loop import PagerLoop

_KILL_POLL_S = 0.01


def main(control_fd: int) -> None:
    control = socket.socket(fileno=control_fd)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    # A process with many others has a descriptor for each, and every fork brings one more.
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Without CAP_SYS_RESOURCE the score can not be lowered.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
    gc.disable()
    # Who started this waits for it and is rid of it; init reaps the guard, whoever lives then.
    if os.fork():
        os._exit(0)
    guard_end, pager_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            guard_end.close()
            status = run_pager(control, pager_end)
        finally:
            os._exit(status)
    pager_end.close()
    os._exit(Guard(control, guard_end, pid).run())


def run_pager(control: socket.socket, guard: socket.socket) -> int:
    """The pager's life; what went wrong is the guard's to tell."""
    loop = PagerLoop(control, guard)
    try:
        with contextlib.suppress(Exception):
            faults.lock_memory()
        loop.run()
    except BaseException as error:
        traceback.print_exc()
        words = {"failed": f"{error}" or type(error).__name__, "never_ran": not loop.resumed}
        with contextlib.suppress(OSError):
            guard.send(json.dumps(words).encode())
        return 1
    return 0


class Guard:
    """Holds the userfaultfds and waits for the pager's end."""

    def __init__(self, control: socket.socket, sock: socket.socket, pager_pid: int) -> None:
        self._control = control
        self._sock = sock
        self._pager = pager_pid
        self._held: dict[int, list[int]] = {}
        self._cgroups: list[str] = []
        self._record = ""
        self._failed = ""
        self._never_ran = False
        self._over = False

    def run(self) -> int:
        pidfd = os.pidfd_open(self._pager)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.register(self._sock, select.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._sock.fileno() in ready and not self._hear():
                poller.unregister(self._sock)
                poller.register(self._sock, 0)
            if pidfd in ready:
                break
        self._sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self._hear():
                pass
        _pid, status = os.waitpid(self._pager, 0)
        if os.waitstatus_to_exitcode(status) == 0 and self._over:
            return 0
        self._end_container(status)
        return 1

    def _hear(self) -> bool:
        """One message of the pager; False when it has none any more."""
        data, descriptors, _flags, _address = socket.recv_fds(self._sock, 65536, 253)
        if not data:
            return False
        message: dict[str, Any] = json.loads(data)
        if "hold" in message:
            self._held[message["hold"]] = descriptors
        for descriptor in self._held.pop(message.get("let_go", 0), []):
            os.close(descriptor)
        if "cgroups" in message:
            self._cgroups, self._record = message["cgroups"], message["record"]
        self._failed = message.get("failed", self._failed)
        self._never_ran = message.get("never_ran", self._never_ran)
        self._over = self._over or message.get("over", False)
        return True

    def _end_container(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        what = self._failed or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
        for directory in self._cgroups:
            kill_cgroup(Path(directory))
        for descriptors in self._held.values():
            for descriptor in descriptors:
                os.close(descriptor)
        message = {"event": "died", "what": what, "never_ran": self._never_ran}
        if self._record:
            with contextlib.suppress(OSError):
                Path(self._record).write_text(json.dumps(message) + "\n")
        with contextlib.suppress(OSError):
            self._control.send(json.dumps(message).encode())


def kill_cgroup(directory: Path) -> None:
    """SIGKILL to every member, frozen or not, until none is left."""
    killer = directory / "cgroup.kill"
    members = directory / "cgroup.procs"
    with contextlib.suppress(FileNotFoundError, OSError):
        while pids := members.read_text().split():
            if killer.exists():
                killer.write_text("1")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            for name in ("cgroup.freeze", "freezer.state"):
                with contextlib.suppress(OSError):
                    (directory / name).write_text("0" if name == "cgroup.freeze" else "THAWED")
            select.poll().poll(_KILL_POLL_S * 1000)


if __name__ == "__main__":
    main(int(sys.argv[1]))
