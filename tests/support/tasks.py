"""Bare processes to dump and restore with CRIU, without a container around them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pycriu import rpc_pb2 as rpc

from runtime.criu.binary import CriuBinary
from runtime.criu.rpc import CriuSession

WORKLOAD = Path(__file__).resolve().parents[1] / "workloads" / "pages.py"
PATIENCE_S = 30.0


class Tasks:
    """The processes of workloads/pages.py, before and after a restore. pids[0] is the parent."""

    def __init__(self, directory: Path, mib: int) -> None:
        self.directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(WORKLOAD), str(directory), str(mib)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        self.pids = [self._process.pid]
        ready = directory / "ready"
        wait_for(ready.exists, "the workload to be ready")
        self.pids = json.loads(ready.read_text())

    def contents(self) -> list[dict[str, Any]]:
        """What each process says that its memory holds, now."""
        return [self._ask(pid) for pid in self.pids]

    def _ask(self, pid: int) -> dict[str, Any]:
        path = self.directory / str(pid)
        before = path.read_text().count("\n") if path.exists() else 0
        os.kill(pid, signal.SIGUSR1)
        wait_for(lambda: path.exists() and path.read_text().count("\n") > before, f"process {pid} to answer")
        found: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
        return found

    def count_up(self, which: int) -> None:
        os.kill(self.pids[which], signal.SIGUSR2)

    def reap(self) -> None:
        """After a dump that killed them. A restore needs the pids."""
        self._process.wait(PATIENCE_S)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in self.pids), "the processes to be gone")

    def kill(self) -> None:
        for pid in reversed(self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        # The restored parent is a child of ours too, but not of Popen's.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pids[0], 0)
        wait_for(lambda: not any(alive(pid) for pid in self.pids), "the processes to be gone")


def alive(pid: int) -> bool:
    """Whether this process can still run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def running_tasks(directory: Path, mib: int) -> Iterator[Tasks]:
    tasks = Tasks(directory, mib)
    try:
        yield tasks
    finally:
        tasks.kill()


def descriptors(pid: int) -> set[str]:
    """What the process holds open, as /proc names it; nothing of one that has gone."""
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def wait_for(condition: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {PATIENCE_S} s for {what}")
        time.sleep(0.005)


@contextlib.contextmanager
def dump_session(
    criu: CriuBinary, pid: int, images: Path, *, page_fd: int | None = None, leave_running: bool = False
) -> Iterator[tuple[CriuSession, Any]]:
    """A `criu swrk` and the DUMP request to send to it. ``page_fd`` keeps its number in CRIU."""
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with CriuSession.spawn(criu, pass_fds=[] if page_fd is None else [page_fd]) as session:
            request = rpc.criu_req(type=rpc.DUMP)
            request.opts.pid = pid
            request.opts.leave_running = leave_running
            _common(request.opts, fd, "dump.log")
            if page_fd is not None:
                request.opts.ps.fd = page_fd
            yield session, request
    finally:
        os.close(fd)


def restore(criu: CriuBinary, images: Path, *, auto_dedup: bool = False) -> None:
    """Restore as a child of this process, which must reap it."""
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with CriuSession.spawn(criu) as session:
            request = rpc.criu_req(type=rpc.RESTORE)
            request.opts.rst_sibling = True
            request.opts.auto_dedup = auto_dedup
            _common(request.opts, fd, "restore.log")
            answer = session.run(request, {}, PATIENCE_S)
            assert answer.success, (images / "restore.log").read_text()
    finally:
        os.close(fd)


def _common(options: Any, images_fd: int, log: str) -> None:
    options.images_dir_fd = images_fd
    options.log_level = 2
    options.log_file = log
    options.notify_scripts = True
    options.manage_cgroups = True
    options.manage_cgroups_mode = rpc.IGNORE
    options.shell_job = False
