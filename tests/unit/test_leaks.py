"""The leak check itself: it sees what is left, and nothing else."""

import os
import socket
import subprocess
import threading

from tests.leaks import descendants, mounts, take_snapshot, wait_for_leaks_to_go


def test_a_quiet_moment_leaks_nothing() -> None:
    before = take_snapshot(whole_host=False)
    assert wait_for_leaks_to_go(before, whole_host=False) == []


def test_an_open_socket_is_named_with_its_number() -> None:
    before = take_snapshot(whole_host=False)
    with socket.socket() as left:
        found = take_snapshot(whole_host=False).leaked_since(before)
        assert [line for line in found if line.startswith(f"file descriptor: {left.fileno()} -> socket:")]


def test_a_closed_and_reopened_number_is_a_leak_too() -> None:
    first, second = os.pipe()
    try:
        before = take_snapshot(whole_host=False)
        with open("/dev/null") as other:
            os.dup2(other.fileno(), first)
        assert f"file descriptor: {first} -> /dev/null" in take_snapshot(whole_host=False).leaked_since(before)
    finally:
        os.close(first)
        os.close(second)


def test_a_running_thread_and_a_child_are_named() -> None:
    before = take_snapshot(whole_host=False)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left-over")
    thread.start()
    child = subprocess.Popen(["cat", "-u"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(b"?")  # its answer says that the new program runs, not our fork of ourselves
        child.stdout.read(1)
        found = take_snapshot(whole_host=False).leaked_since(before)
        assert "thread: left-over" in found
        assert f"process: {child.pid} cat -u" in found
    finally:
        stop.set()
        thread.join()
        child.communicate()


def test_a_child_of_another_thread_is_named_too() -> None:
    before = take_snapshot(whole_host=False)
    started, stop = threading.Event(), threading.Event()
    children: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        children.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE))
        started.set()
        stop.wait()

    thread = threading.Thread(target=start)
    thread.start()
    started.wait()
    try:
        found = take_snapshot(whole_host=False).leaked_since(before)
        assert [line for line in found if line.startswith(f"process: {children[0].pid} ")]
    finally:
        stop.set()
        thread.join()
        children[0].communicate()


def test_a_child_nobody_waited_for_is_a_leak() -> None:
    before = take_snapshot(whole_host=False)
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        found = take_snapshot(whole_host=False).leaked_since(before)
        assert f"process: {child.pid} true (Z)" in found


def test_a_leak_that_goes_by_itself_within_the_grace_is_none() -> None:
    before = take_snapshot(whole_host=False)
    timer = threading.Timer(0.2, lambda: None)
    timer.start()
    assert wait_for_leaks_to_go(before, whole_host=False) == []


def test_descendants_reach_over_generations() -> None:
    assert descendants({2: 1, 3: 2, 4: 3, 5: 1, 6: 5}, 2) == {3, 4}


def test_a_second_mount_on_one_place_is_another_mount() -> None:
    line = "{} 27 0:24 / /run/user rw,relatime shared:2 - tmpfs tmpfs rw\n"
    assert list(mounts(line.format(31) + line.format(32)).values()) == ["/run/user (tmpfs)"] * 2
