"""What a process notices of being armed: nothing. And which processes are left alone, with the reason."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.memory.tracker_uffd import UffdTracker
from tests.support.tasks import descriptors, wait_for
from tests.support.tracer import ThreadTracer

WORKLOADS = Path(__file__).resolve().parents[1] / "workloads"
BLOCKED_S = 0.5
CALLS = (
    *("read", "poll", "poll with timeout", "select", "epoll_wait", "epoll_wait with timeout", "epoll_pwait"),
    *("accept", "accept with timeout", "recv", "recv with timeout", "futex", "semop", "msgrcv", "flock", "fcntl lock"),
    *("waitpid", "sigtimedwait", "pause", "nanosleep", "clock_nanosleep", "timerfd"),
)


@contextlib.contextmanager
def python(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """A program of tests/workloads, or ``-c CODE``, that has said a first line."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-u", *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait(10)
        process.stdin.close()
        process.stdout.close()


def arm_once(pid: int) -> tuple[str, float]:
    """Why the process can not be tracked, and how long its thread stood still."""
    tracker = UffdTracker(tracer=ThreadTracer())  # which is made sooner
    try:
        tracker.arm([pid])
        facts = tracker.facts()
        return facts.untracked.get(pid, ""), facts.stop_ms.get(pid, 0.0)
    finally:
        tracker.close()


@pytest.fixture
def tracker() -> Iterator[UffdTracker]:
    made = UffdTracker()
    yield made
    made.close()


@pytest.mark.parametrize("call", CALLS)
def test_a_process_that_sleeps_in_a_system_call_does_not_notice(call: str) -> None:
    with python(str(WORKLOADS / "blocked.py"), call, str(BLOCKED_S)) as process:
        assert process.stdout is not None
        end = time.monotonic() + BLOCKED_S * 0.8
        reasons = set()
        while time.monotonic() < end:
            reasons.add(arm_once(process.pid)[0])
            time.sleep(0.005)
        assert reasons == {""}
        found = json.loads(process.stdout.readline())
    # pause() has no other answer than EINTR, and gives it when the handler has run.
    expected = 4 if call == "pause" else 0
    assert (found["errno"], found["result"] >= 0) == (expected, call != "pause")
    assert BLOCKED_S * 0.9 < found["took_s"] < BLOCKED_S * 3


def test_the_thread_stands_still_for_less_than_a_millisecond(tracker: UffdTracker) -> None:
    with python("-c", "print(); input()") as process:
        stops_ms = sorted(arm_once(process.pid)[1] for _ in range(40))
    # The machine may take the processor away in the middle of one, and of most of them when it is busy.
    assert min(stops_ms) < 1.0, stops_ms


def test_a_process_that_calculates_keeps_its_registers(tracker: UffdTracker) -> None:
    code = """
import hashlib
print()
digest = b""
for number in range(300000):
    digest = hashlib.sha256(digest + b"%d" % number).digest()
print(digest.hex())
"""
    with python("-c", code) as process:
        assert process.stdout is not None
        while process.poll() is None and not arm_once(process.pid)[0]:
            time.sleep(0.001)
        found = process.stdout.readline().strip()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found == done.stdout.split()[-1]


def test_signals_that_come_meanwhile_are_all_handled() -> None:
    code = """
import select, signal, sys
count = 0
def handle(*_):
    global count
    count += 1
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
print()
while not select.select([sys.stdin], [], [], 0)[0]:
    sum(range(1000))
signal.setitimer(signal.ITIMER_REAL, 0)
print(count)
"""
    with python("-c", code) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        for _ in range(60):
            assert arm_once(process.pid)[0] == ""
            time.sleep(0.01)
        process.stdin.write("\n")
        process.stdin.flush()
        assert int(process.stdout.readline()) > 300


def test_a_stopped_process_is_armed_and_stays_stopped() -> None:
    with python("-c", "print(); print(input())") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert arm_once(process.pid)[0] == ""
        assert state_of(process.pid) == "T"
        process.send_signal(signal.SIGCONT)
        process.stdin.write("still there\n")
        process.stdin.flush()
        assert process.stdout.readline() == "still there\n"


def test_a_thread_that_outlived_its_leader_is_armed() -> None:
    code = """
import ctypes, threading, time
def rest():
    time.sleep(0.2)
    print(flush=True)
    time.sleep(60)
threading.Thread(target=rest).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    with python("-c", code) as process:
        assert state_of(process.pid) == "Z"
        tracker = UffdTracker()
        try:
            tracker.arm([process.pid])
            scan = tracker.scan([process.pid])
            assert (scan.processes[0].reason, scan.processes[0].existing.pages > 100) == ("", True)
            assert tracker.scan([process.pid]).processes[0].to_copy.pages < 50
        finally:
            tracker.close()


def test_a_zombie_is_left_out(tracker: UffdTracker) -> None:
    with python("-c", "print()") as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert state_of(process.pid) == "Z"
        tracker.arm([process.pid])
        assert tracker.scan([process.pid]).processes == ()


def test_a_process_that_is_debugged_is_untracked_memory(tracker: UffdTracker) -> None:
    debugger = "import ctypes\nptrace = ctypes.CDLL(None).ptrace\nprint(ptrace(0x4206, PID, 0, 0))\ninput()"
    with python("-c", "print(); input()") as process, python("-c", debugger.replace("PID", str(process.pid))) as other:
        tracker.arm([process.pid])
        (found,) = tracker.scan([process.pid]).processes
        assert found.reason == f"it is traced by process {other.pid}"
        assert found.to_copy == found.existing
        assert found.existing.pages > 100
        assert tracker.facts().untracked == {process.pid: found.reason}


def test_a_32_bit_program_is_untracked_memory(tracker: UffdTracker, tmp_path: Path) -> None:
    program = tmp_path / "sleeper"
    program.write_bytes(elf32_that_sleeps())
    program.chmod(0o755)
    process = subprocess.Popen([program])
    try:
        time.sleep(0.05)
        tracker.arm([process.pid])
        (found,) = tracker.scan([process.pid]).processes
        assert found.reason == "it is a 32-bit program"
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(10)


def elf32_that_sleeps() -> bytes:
    """for (;;) pause(); for i386, with a page of data that it has written to."""
    base = 0x8048000
    #        incl counter; mov $29, %eax (pause); int $0x80; jmp back
    code = b"\xff\x05" + struct.pack("<I", base + 0x800) + b"\xb8\x1d\x00\x00\x00\xcd\x80\xeb\xf1"
    head = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\x01\x01\x01", 2, 3, 1, base + 84, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    segment = struct.pack("<8I", 1, 0, base, base, 0x1000, 0x1000, 7, 0x1000)
    return (head + segment + code).ljust(0x1000, b"\0")


def test_a_process_that_may_only_read_and_write_is_armed_and_lives(tracker: UffdTracker) -> None:
    # prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT): any other system call is its death.
    code = "import ctypes\nlibc = ctypes.CDLL(None)\nprint()\nlibc.prctl(22, 1, 0, 0, 0)\nlibc.read(0, 0, 1)"
    with python("-c", code) as process:
        wait_for(lambda: status_of(process.pid, "Seccomp") == "1", "strict mode")
        tracker.arm([process.pid])
        assert tracker.scan([process.pid]).processes[0].reason == ""
        assert (process.poll(), state_of(process.pid)) == (None, "S")


def test_a_process_that_handles_its_own_system_calls_is_untracked_memory(tracker: UffdTracker) -> None:
    # prctl(PR_SET_SYSCALL_USER_DISPATCH, ON, 0, 0, &selector) with a selector that lets all calls through.
    code = """
import ctypes
selector = ctypes.c_byte(0)
print(ctypes.CDLL(None).prctl(59, 1, 0, 0, ctypes.byref(selector)))
input()
"""
    with python("-c", code) as process:
        tracker.arm([process.pid])
        (found,) = tracker.scan([process.pid]).processes
        assert found.reason == "it handles its own system calls (syscall user dispatch)"
        assert found.to_copy == found.existing


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the program is machine code for x86-64")
def test_a_restartable_sequence_is_not_broken_into() -> None:
    with python(str(WORKLOADS / "restartable.py")) as process:
        assert process.stdout is not None
        flag, pointer, descriptor = (int(text) for text in process.stdout.readline().split())
        memory = os.open(f"/proc/{process.pid}/mem", os.O_RDWR)
        try:
            for _ in range(20):
                assert arm_once(process.pid)[0] in ("", "its thread is in a restartable sequence each time")
                # Were it cleared while the program is inside, it would stay so: the program would not be started anew.
                wait_for(lambda: int.from_bytes(os.pread(memory, 8, pointer), "little") == descriptor, "the sequence")
            os.pwrite(memory, b"\x01", flag)
        finally:
            os.close(memory)
        assert process.stdout.readline() == "left\n"


def test_a_child_after_vfork_is_said_to_run_in_its_parents_memory(tracker: UffdTracker) -> None:
    # posix_spawn runs the child in the parent's memory until it has its program; opening a FIFO takes until we open it.
    code = """
import os, sys
print()
input()
os.mkfifo(sys.argv[1])
os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 5, sys.argv[1], os.O_RDONLY, 0)])
input()
"""
    path = f"/tmp/cmigrate-vfork-{os.getpid()}"
    with python("-c", code, path) as process:
        try:
            assert process.stdin is not None
            tracker.arm([process.pid])
            tracker.scan([process.pid])
            process.stdin.write("\n")
            process.stdin.flush()
            child = first_child(process.pid)
            found = {each.pid: each for each in tracker.scan([process.pid, child]).processes}
            assert found[child].shares_memory_with == process.pid
            assert found[process.pid].reason == ""
            os.close(os.open(path, os.O_WRONLY))
        finally:
            os.unlink(path)


def first_child(pid: int) -> int:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.002)
    raise AssertionError("no child")


def test_no_process_keeps_a_userfaultfd(tracker: UffdTracker) -> None:
    """CRIU can not dump one. Children forked at the worst moment inherit it: it is taken back from them."""
    code = """
import os, threading, time
def fork():
    while True:
        pid = os.fork()
        if not pid:
            time.sleep(0.05)
            os._exit(0)
        os.waitpid(pid, 0)
for _ in range(3):
    threading.Thread(target=fork, daemon=True).start()
print()
time.sleep(60)
"""
    with python("-c", code) as process:
        for _ in range(40):
            tracker.arm([process.pid])
            children = [int(each) for task in threads_of(process.pid) for each in read(task / "children").split()]
            tracker.scan([process.pid, *children])
            for pid in [process.pid, *children]:
                assert "anon_inode:[userfaultfd]" not in descriptors(pid)
            tracker.close()


def threads_of(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def status_of(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return line.split(":")[1].strip()
    return ""


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
