"""The monitor of one container: a stand-alone program, ``python -I -S -B monitor.py FD``. Stdlib only, one thread.

It is the parent of the container's first process for as long as that lives: it keeps the log pipes, writes the log,
waits, and records the exit. It survives the command that started it, and a restored container gets a monitor of its
own the same way, whose child ``criu swrk`` brings the container up as the monitor's own child.

FD is one end of a SOCK_SEQPACKET pair: JSON datagrams, descriptors by SCM_RIGHTS.
  caller: {"mode": "run"|"restore", "spec", "directory", "run_dir", "cgroup_paths", ...}   (launch.py)
  run      monitor: {"event": "created", "init_pid"}   caller: {"op": "go"}   monitor: {"event": "started"}
  restore  monitor: {"event": "sandbox", ...}   caller: {"op": "mount"}   monitor: {"event": "mounted"}
           caller: {"op": "adopt", "init_pid"}   monitor: {"event": "started"}
  either   monitor: {"event": "failed", "what", "exit_code"} and it undoes what it did and ends.
The caller closing FD before "started" is the order to undo everything.
Afterwards RUN/monitor.sock takes one request a connection: see service.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.linux import calls
from runtime.sandbox import charger, init, rootfs
from runtime.sandbox.service import Service

MAX_MESSAGE_BYTES = 1 << 20
# Descriptor numbers inside the restoring CRIU; runtime/criu/restore.py names them in its request.
CRIU_RPC_FD = 3
CRIU_LOG_FDS = (10, 11)
CRIU_MEMORY_FDS = range(12, 32)


class LaunchFailed(Exception):
    """Nothing runs; ``exit_code`` is what ``cmigrate run`` answers."""

    def __init__(self, what: str, exit_code: int = 125) -> None:
        super().__init__(what)
        self.exit_code = exit_code


class Monitor:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        message, fds, _flags, _address = socket.recv_fds(control, MAX_MESSAGE_BYTES, 2 + len(CRIU_MEMORY_FDS))
        self._config: dict[str, Any] = json.loads(message)
        self._passed_fds = fds
        self._pipes = [os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)]
        self._init_pid = 0

    def main(self) -> int:
        calls.prctl(calls.PR_SET_CHILD_SUBREAPER, 1)
        self._host_mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        calls.unshare(calls.CLONE_NEWNS)
        calls.mount("none", "/", "", calls.MS_REC | calls.MS_PRIVATE)
        try:
            rootfs.make_outer_mounts(self._config["spec"], self._config["run_dir"])
            if self._config["mode"] == "run":
                self._run()
            else:
                self._restore()
        except Exception as error:
            self._undo()
            code = error.exit_code if isinstance(error, LaunchFailed) else 125
            with contextlib.suppress(OSError):
                self._tell({"event": "failed", "what": str(error), "exit_code": code})
            if not isinstance(error, (LaunchFailed, OSError)):
                traceback.print_exc()
            return 1
        for _reader, writer in self._pipes:
            os.close(writer)
        service = Service(self._config, self._init_pid, [reader for reader, _writer in self._pipes], self._to_host)
        with contextlib.suppress(OSError):
            # A restored container was let go when "adopt" came: it stays, whether or not the caller still lives.
            self._tell({"event": "started", "init_pid": self._init_pid})
        self._control.close()
        service.loop()
        # What cleans up must see the host's mounts, and the container's go.
        self._to_host()
        service.start_aftermath()
        return 0

    def _to_host(self) -> None:
        """Out of the namespace with the container's mounts."""
        os.chdir("/")
        calls.setns(self._host_mounts, calls.CLONE_NEWNS)

    def _tell(self, message: dict[str, Any]) -> None:
        self._control.send(json.dumps(message).encode())

    def _hear(self, wanted: str) -> dict[str, Any]:
        data = self._control.recv(MAX_MESSAGE_BYTES)
        message: dict[str, Any] = json.loads(data) if data else {}
        if message.get("op") != wanted:
            raise LaunchFailed("the launching command gave up")
        return message

    def _mount_root(self) -> None:
        rootfs.mount_root(self._config["spec"], self._config["directory"], self._config["run_dir"])

    def _run(self) -> None:
        self._mount_root()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        outer = os.fork()
        if outer == 0:
            try:
                ours.close()
                self._control.close()
                init.outer_child(self._config, theirs, (self._pipes[0][1], self._pipes[1][1]))
            except BaseException as error:
                with contextlib.suppress(OSError):
                    theirs.send(f"exit 125 {error}".encode())
            finally:
                os._exit(125)
        theirs.close()
        self._expect(ours, "map")
        if self._config["spec"]["userns"] == "private":
            write_identity_map(outer)
        ours.send(b"mapped")
        # Two processes say so, and either may be first.
        said = self._expect(ours, "pid", "ready")
        self._init_pid = int(said["pid"])
        os.waitpid(outer, 0)
        self._tell({"event": "created", "init_pid": self._init_pid})
        self._hear("go")
        ours.send(b"go")
        rest = ours.recv(4096).decode()
        if rest:
            raise _child_failure(rest)

    @staticmethod
    def _expect(sock: socket.socket, *words: str) -> dict[str, str]:
        """What is said with each of the words, in whatever order they come."""
        said: dict[str, str] = {}
        while len(said) < len(words):
            answer = sock.recv(4096).decode()
            word, _, rest = answer.partition(" ")
            if word not in words or word in said:
                raise _child_failure(answer)
            said[word] = rest
        return said

    def _restore(self) -> None:
        """Start ``criu swrk`` as a child, in the container's cgroups; the caller talks to it and says how it went."""
        rpc, charging, *memory = self._passed_fds
        self._start_charger(charging)
        criu = os.fork()
        if criu == 0:
            try:
                self._control.close()
                self._exec_criu(rpc, memory)
            finally:
                os._exit(127)
        for fd in self._passed_fds:
            os.close(fd)
        reader_inodes = [os.fstat(reader).st_ino for reader, _writer in self._pipes]
        self._tell(
            {
                "event": "sandbox",
                "criu_pid": criu,
                "root": f"{self._config['run_dir']}/root",
                "log_fds": list(CRIU_LOG_FDS),
                "memory_fds": list(CRIU_MEMORY_FDS[: len(memory)]),
                "pipes": reader_inodes,
            }
        )
        # The upper layer has been filled from outside until now, which an overlay would not bear.
        self._hear("mount")
        self._mount_root()
        self._tell({"event": "mounted"})
        message = self._hear("adopt")
        self._init_pid = int(message["init_pid"])
        os.waitpid(criu, 0)

    def _start_charger(self, fd: int) -> None:
        if os.fork() == 0:
            try:
                os.dup2(fd, 3)
                os.closerange(4, 4096)
                charger.serve(socket.socket(fileno=3), self._config["cgroup_paths"])
            finally:
                os._exit(0)

    def _exec_criu(self, rpc: int, memory: list[int]) -> None:
        init.join_cgroups(self._config["cgroup_paths"])
        # Tasks that CRIU restores with cgroups ignored stay in its cgroup and its cgroup namespace: the container's.
        calls.unshare(calls.CLONE_NEWCGROUP)
        null = os.open("/dev/null", os.O_RDWR)
        log = os.open(self._config["criu_output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        wanted = {0: null, 1: log, 2: log, CRIU_RPC_FD: rpc}
        wanted |= {number: writer for number, (_reader, writer) in zip(CRIU_LOG_FDS, self._pipes, strict=True)}
        wanted |= dict(zip(CRIU_MEMORY_FDS, memory, strict=False))
        # First out of the way of the wanted numbers, then onto them.
        moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for number, fd in wanted.items()}
        for fd in self._passed_fds:
            os.close(fd)
        for number, fd in moved.items():
            os.dup2(fd, number)
        os.closerange(max(wanted) + 1, 4096)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        argv = [*self._config["criu_argv"], "swrk", str(CRIU_RPC_FD)]
        os.execve(argv[0], argv, self._config["criu_environment"])

    def _undo(self) -> None:
        """Kill what was started; mounts go with this process."""
        for path in self._config["cgroup_paths"]:
            kill = Path(path) / "cgroup.kill"
            if kill.exists():
                with contextlib.suppress(OSError):
                    kill.write_text("1")
        if self._init_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._init_pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


def write_identity_map(pid: int) -> None:
    """All ids map to themselves: files keep their owners without idmapped mounts; capabilities end at the namespace."""
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text("0 0 4294967295")


def _child_failure(answer: str) -> LaunchFailed:
    if answer.startswith("exit "):
        _word, code, what = answer.split(" ", 2)
        return LaunchFailed(what, int(code))
    return LaunchFailed("the container's first process ended before it could start")


def main() -> int:
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    return Monitor(control).main()


if __name__ == "__main__":
    sys.exit(main())
