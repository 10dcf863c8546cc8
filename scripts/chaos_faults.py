"""What dies in a chaos run, and at which moment of a move."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from migrate.serve import SESSION_COMM
from tests.support.lab import TwoHosts
from tests.support.netns import in_netns

LINK_DOWN_S = 1.0
LINK_CUT_S = 45.0
"""How long a cut link stays so at the most; it comes back earlier when the mover has given up."""
POLL_S = 0.0005
# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1
_IFREQ = struct.Struct("16sH22x")

# Who is killed, by what is among the arguments, on which side. A session of an agent is named after its process' name.
VICTIMS: dict[str, tuple[str, Callable[[list[str]], bool]]] = {
    "agent": ("target", lambda argv: argv[0] == SESSION_COMM or "--stdio" in argv),
    "criu-source": ("source", lambda argv: "swrk" in argv or "criu:" in " ".join(argv).split()),
    "criu-target": ("target", lambda argv: "swrk" in argv or "criu:" in " ".join(argv).split()),
    "sshd": ("target", lambda argv: argv[0].startswith("sshd: ") and "[listener]" not in argv[0]),
    "pager": ("target", lambda argv: any(word.endswith("/pager_main.py") for word in argv)),
}
FAULTS = ("mover", "agent", "both", "criu-source", "criu-target", "sshd", "pager", "interrupt", "reset", "link", "cut")

# Phases that `move --json` tells of as they begin (those in the blackout are told afterwards), the freeze, and the
# records of the two journals: the moment between that record and what follows it.
PHASES = ("prepare", "files", "rounds")
RECORDS = {
    "PREPARED": "source",
    "RESERVED": "target",
    "RESTORED_HELD": "target",
    "COMMITTED": "source",
    "COMMIT_LOGGED": "target",
    "RESUMED": "target",
    "DONE": "source",
    "CONFIRMED": "target",
}
# Of a container whose copy is kept: the first when it is moved, the others when it is taken back. Side and record.
WINDOW_RECORDS = {
    "KEEPING": ("source", "KEEPING"),
    "RETURNING": ("source", "RETURNING"),
    "RETURNING-there": ("target", "RETURNING"),
    "RETURNED": ("target", "RETURNED"),
    "TAKEN_BACK": ("source", "TAKEN_BACK"),
}
MOMENTS = ("start", *PHASES, "frozen", *RECORDS, *WINDOW_RECORDS)
NOT_IN_A_WINDOW = ("criu-source", "criu-target", "pager")
"""There is none any more."""


class Going:
    """One `cmigrate move --json` under way: its events as they come, and its journals; or an `undo` of it. ``known``:
    journals of earlier moves."""

    def __init__(
        self, hosts: TwoHosts, source: str, target: str, words: tuple[str, ...], known: set[Path] | None = None
    ) -> None:
        self._hosts = hosts
        self.source, self.target = source, target
        self._journals = {"source": journals_of(hosts, source), "target": journals_of(hosts, target)}
        self._known = known_journals(hosts, source, target) if known is None else known
        self.process = hosts.lab.popen(
            source,
            ["cmigrate", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=_read, args=(self.process.stdout, self.lines)),
            threading.Thread(target=_read, args=(self.process.stderr, self.errors)),
        ]
        for reader in self._readers:
            reader.start()

    def over(self) -> bool:
        return self.process.poll() is not None

    def wait(self, timeout_s: float) -> bool:
        """To its end; False when it had to be killed."""
        in_time = True
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            in_time = False
            self.process.kill()
            self.process.wait()
        for reader in self._readers:
            reader.join()
        return in_time

    def reached(self, side: str) -> list[str]:
        """The phases in this move's journal on that side, oldest first."""
        for path in self._new_journals(side):
            lines = path.read_text(errors="replace").split("\n")
            return [json.loads(line)["phase"] for line in lines if line.startswith("{") and line.endswith("}")]
        return []

    def move_id(self) -> str:
        return next((path.name.partition(".")[0] for path in self._new_journals("source")), "")

    def _new_journals(self, side: str) -> list[Path]:
        return [path for path in self._journals[side].glob(f"*.{side}.jsonl") if path not in self._known]

    def wait_for(self, moment: str) -> bool:
        """False when the move was over before that."""
        if moment == "start":
            return True
        has_come = self._watch(moment)
        while not self.over():
            if has_come():
                return True
            time.sleep(POLL_S)
        return False

    def _watch(self, moment: str) -> Callable[[], bool]:
        if moment in PHASES:
            begins = f'"type":"phase-started","name":"{moment}"'
            return lambda: any(begins in line for line in self.lines)
        if moment == "frozen":
            parent = self._hosts.config(self.source).cgroup_parent
            names = ("cgroup.events", "freezer.state")
            files = [file for name in names for file in Path("/sys/fs/cgroup").glob(f"**/{parent}/*/{name}")]
            return lambda: any(map(_is_frozen, files))
        side, record = WINDOW_RECORDS.get(moment) or (RECORDS[moment], moment)
        return lambda: record in self.reached(side)


def journals_of(hosts: TwoHosts, host: str) -> Path:
    return hosts.lab.directory / host / "state" / "journal"


def known_journals(hosts: TwoHosts, *names: str) -> set[Path]:
    return {path for name in names for path in journals_of(hosts, name).glob("*")}


@contextlib.contextmanager
def fault(hosts: TwoHosts, going: Going, name: str) -> Iterator[list[str]]:
    """It happens on entry; hands out what was hit. A link that was cut is back on exit."""
    hit: list[str] = []
    if name in ("mover", "both") and not going.over():
        os.kill(going.process.pid, signal.SIGKILL)
        hit.append("mover")
    if name == "interrupt" and not going.over():
        os.killpg(going.process.pid, signal.SIGINT)
        hit.append("mover")
    victim = "agent" if name == "both" else name
    if victim in VICTIMS:
        side, is_one = VICTIMS[victim]
        # The pager's guard is its parent: what it is for is to outlive it.
        most = 1 if victim == "pager" else None
        hit += _kill(hosts, going.source if side == "source" else going.target, is_one, most)
    if name == "reset":
        hit += reset_connections(hosts, going.target)
    if name not in ("link", "cut"):
        yield hit
        return
    hit.append("link")
    set_link(hosts, going.target, up=False)
    try:
        if name == "link":
            time.sleep(LINK_DOWN_S)
        else:
            deadline = time.monotonic() + LINK_CUT_S
            while not going.over() and time.monotonic() < deadline:
                time.sleep(0.05)
    finally:
        set_link(hosts, going.target, up=True)
    yield hit


def reset_connections(hosts: TwoHosts, host: str) -> list[str]:
    """All that the host itself has, as a firewall on the way does that forgets them."""
    argv = ["ss", "-H", "-t", "-n", "-K", "state", "established"]
    done = hosts.lab.exec(host, argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=20)
    return str(done.stdout).splitlines()


def set_link(hosts: TwoHosts, host: str, *, up: bool) -> None:
    """By one system call: starting `ip` takes as long as a blackout."""

    def change() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ.pack(b"uplink", 0))
            _name, flags = _IFREQ.unpack(answer)
            flags = flags | _IFF_UP if up else flags & ~_IFF_UP
            fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ.pack(b"uplink", flags))

    in_netns(hosts.lab.host(host).holder.pid, change)


def _kill(hosts: TwoHosts, host: str, is_one: Callable[[list[str]], bool], most: int | None) -> list[str]:
    """The processes of that host that are so, newest first, ``most`` of them; what they were."""
    hit: list[str] = []
    for pid, argv in processes(hosts, host, is_one):
        if len(hit) == most:
            break
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            hit.append(" ".join(argv)[-60:])
    return hit


def processes(hosts: TwoHosts, host: str, is_one: Callable[[list[str]], bool]) -> Iterator[tuple[int, list[str]]]:
    """Those of that host that are so, newest first, with their arguments."""
    own = os.stat(f"/proc/{hosts.lab.host(host).holder.pid}/ns/net").st_ino
    for pid in sorted((int(entry) for entry in os.listdir("/proc") if entry.isdigit()), reverse=True):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            argv = text.rstrip("\0").split("\0")
            if (comm := Path(f"/proc/{pid}/comm").read_text().strip()) == SESSION_COMM:
                argv = [comm]
            if argv[0] and is_one(argv) and os.stat(f"/proc/{pid}/ns/net").st_ino == own:
                yield pid, argv


def _is_frozen(file: Path) -> bool:
    with contextlib.suppress(OSError):
        text = file.read_text()
        return "frozen 1" in text or text.strip() in ("FROZEN", "FREEZING")
    return False


def _read(stream: IO[str] | None, into: list[str]) -> None:
    assert stream is not None
    with stream:
        for line in stream:
            into.append(line)
