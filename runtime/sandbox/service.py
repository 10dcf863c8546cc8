"""What a monitor does once its container runs: pump the log, answer requests, wait for the end. Stdlib only.

Requests on RUN/monitor.sock (SOCK_SEQPACKET, one JSON datagram each way):
  {"op": "status"}  -> {"init_pid", "monitor_pid", "pipes": [inode, inode]}
  {"op": "drain"}   -> {} after everything that lay in the pipes is in the log
  {"op": "release"} -> {}: the container leaves this host; its end is no exit and not recorded
  {"op": "keep"}    -> {}: it stays after all
  {"op": "alarm", "after_s", "argv"} -> {}: start this program then, and again after 2, 4, 8, … seconds, at last every
                       minute, while the container is here and released; after_s 0: never mind
  {"op": "wait"}    -> {"exit_code"} when it ends
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.logs import LogWriter

PIPE_READ_BYTES = 1 << 16
MAX_REQUEST_BYTES = 4096
ALARM_AGAIN_S = (2.0, 60.0)


class Service:
    def __init__(
        self, config: Mapping[str, Any], init_pid: int, readers: list[int], to_host: Callable[[], object]
    ) -> None:
        """``to_host`` brings a process out of the namespace with the container's mounts."""
        self._to_host = to_host
        self._config = config
        self._init_pid = init_pid
        self._directory = Path(config["directory"])
        self._log = LogWriter(self._directory / "log.jsonl")
        self._readers = dict(zip(readers, ("stdout", "stderr"), strict=True))
        self._pipe_inodes = [os.fstat(reader).st_ino for reader in readers]
        self._selector = selectors.DefaultSelector()
        for reader in readers:
            os.set_blocking(reader, False)
            self._selector.register(reader, selectors.EVENT_READ, self._pump)
        self._listener = self._listen(Path(config["run_dir"]) / "monitor.sock")
        self._waiters: list[socket.socket] = []
        self._released = False
        self._alarm_at_s = 0.0
        self._alarm_argv: list[str] = []
        self._alarm_again_s = ALARM_AGAIN_S[0]
        self._child_events = self._watch_children()
        self._init_fd = os.pidfd_open(init_pid)
        self._selector.register(self._init_fd, selectors.EVENT_READ, lambda _fd: None)

    def _listen(self, path: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(16)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        return listener

    def _watch_children(self) -> int:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._selector.register(reader, selectors.EVENT_READ, lambda fd: os.read(fd, 4096))
        return reader

    def loop(self) -> None:
        """Until the container's first process is gone; its exit is recorded before this returns."""
        status = self._reap()
        while status is None:
            for key, _events in self._selector.select(self._until_alarm()):
                key.data(key.fd)
            if self._until_alarm() == 0.0:
                self._alarm_at_s = time.monotonic() + self._alarm_again_s
                self._alarm_again_s = min(2 * self._alarm_again_s, ALARM_AGAIN_S[1])
                self._start(self._alarm_argv, self._to_host)
            status = self._reap()
        self._drain()
        exit_code = os.waitstatus_to_exitcode(status)
        # A shell's way to tell a signal: 128 + its number.
        exit_code = 128 - exit_code if exit_code < 0 else exit_code
        if not self._released:
            self._record_exit(exit_code)
        for waiter in self._waiters:
            self._answer(waiter, {"exit_code": exit_code, "released": self._released})
        with contextlib.suppress(OSError):
            (Path(self._config["run_dir"]) / "monitor.sock").unlink()
        self._listener.close()

    def _until_alarm(self) -> float | None:
        """Seconds; None without one."""
        return max(0.0, self._alarm_at_s - time.monotonic()) if self._released and self._alarm_argv else None

    def _reap(self) -> int | None:
        found = None
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self._init_pid:
                    found = status
        return found

    def _pump(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(fd, PIPE_READ_BYTES)
            if data:
                self._log.write(self._readers[fd], data)
            else:
                self._selector.unregister(fd)
                del self._readers[fd]
                os.close(fd)

    def _drain(self) -> None:
        for fd in list(self._readers):
            while fd in self._readers:
                try:
                    data = os.read(fd, PIPE_READ_BYTES)
                except BlockingIOError:
                    break
                if not data:
                    break
                self._log.write(self._readers[fd], data)
        self._log.flush()

    def _accept(self, _fd: int) -> None:
        connection, _address = self._listener.accept()
        connection.settimeout(1.0)
        keep = False
        try:
            request = json.loads(connection.recv(MAX_REQUEST_BYTES) or b"{}")
            keep = self._serve(request, connection)
        except (OSError, ValueError):
            pass  # a client that went away or sent nonsense is its own problem
        finally:
            if not keep:
                connection.close()

    def _serve(self, request: Mapping[str, Any], connection: socket.socket) -> bool:
        op = request.get("op")
        if op == "wait":
            self._waiters.append(connection)
            return True
        if op == "status":
            pids = {"init_pid": self._init_pid, "monitor_pid": os.getpid()}
            self._answer(connection, {**pids, "pipes": self._pipe_inodes})
        elif op == "drain":
            self._drain()
            self._answer(connection, {})
        elif op == "alarm":
            after_s = float(request.get("after_s", 0))
            self._alarm_at_s = time.monotonic() + after_s
            self._alarm_argv = [str(word) for word in request.get("argv", ())] if after_s else []
            self._answer(connection, {})
        elif op in ("release", "keep"):
            self._released = op == "release"
            self._answer(connection, {})
        return False

    @staticmethod
    def _answer(connection: socket.socket, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            connection.send(json.dumps(message).encode())

    def _record_exit(self, exit_code: int) -> None:
        file = self._directory / "state.json"
        state = json.loads(file.read_text())
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        state |= {
            "status": "exited",
            "exit_code": exit_code,
            "finished_at": now,
            "init_pid": 0,
            "init_start_ticks": 0,
            "oom_killed": self._oom_killed(),
        }
        write_durably(file, json.dumps(state).encode())

    def _oom_killed(self) -> bool:
        for directory in self._config["cgroup_paths"]:
            for name in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError):
                    for line in (Path(directory) / name).read_text().splitlines():
                        key, _, value = line.partition(" ")
                        if key == "oom_kill" and int(value) > 0:
                            return True
        return False

    def start_aftermath(self) -> None:
        """What needs netlink and the rest of the program happens in a process of its own: clean-up, restart policy."""
        if not self._released:
            self._start([self._config["python"], "-m", "runtime.aftermath", self._config["spec"]["id"]])

    def _start(self, argv: list[str], enter: Callable[[], object] | None = None) -> None:
        with open(os.devnull, "r+b") as null:
            subprocess.Popen(
                argv,
                preexec_fn=enter,
                stdin=null,
                stdout=null,
                stderr=null,
                cwd="/",
                env=self._config["environment"],
                start_new_session=True,
            )


def write_durably(file: Path, data: bytes) -> None:
    """Replace ``file`` by rename; file and directory are on disk when this returns."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, file)
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
