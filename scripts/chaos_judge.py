"""The container of a chaos run, the judge who hears it from outside, and what both hosts may hold afterwards."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tests.support.lab import HOSTS, TwoHosts

NAME = "counter"
MEMORY_MIB = 64
STILL_S = 0.3
# Numbers each millisecond, in a life: a container that was lost is started again in the next one. Every page holds the
# number that was last written to it, and random bytes; eight of them are looked at between two numbers.
COUNTER = """
import mmap, os, socket, sys, time, zlib
to, life, size = (sys.argv[1], 9999), sys.argv[2], int(sys.argv[3]) << 20
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
pages = size // 4096
written = [0] * pages
sums = []
for page in range(pages):
    noise = os.urandom(4088)
    area[page * 4096:page * 4096 + 4096] = bytes(8) + noise
    sums.append(zlib.crc32(noise))
judge = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
number = seen = 0
said = ""
while True:
    number += 1
    at = number * 7 % pages
    area[at * 4096:at * 4096 + 8] = number.to_bytes(8, "little")
    written[at] = number
    for seen in range(seen, seen + 8):
        page = seen % pages
        found = area[page * 4096:page * 4096 + 4096]
        if int.from_bytes(found[:8], "little") != written[page] or zlib.crc32(found[8:]) != sums[page]:
            said = " page %d of number %d" % (page, written[page])
    seen += 1
    try:
        judge.sendto(("%s %d %d%s" % (life, number, time.time_ns(), said)).encode(), to)
    except OSError:
        pass
    time.sleep(0.001)
"""
# Answers each empty line on stdin with what it has counted. Numbers bear the time at which they were sent (a lab's
# hosts have one clock), for a link that comes back delivers what waited for it after what did not. One that comes
# twice, or was sent later than a larger one, means that two copies run, or one from an old state; so does one of an
# earlier life. Between "back" and "stay" the container may begin again, once, with a number that has come before: from
# then on nothing of what it was may be sent any more. One that was frozen between looking at the clock and sending then
# sends this very number a second time.
JUDGE = """
import bisect, json, select, socket, sys
inbox = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
inbox.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
inbox.bind(("", 9999))
life = count = missing = back_at = 0
may_go_back = may_repeat = False
seen = []
wrong = []
print("ready", flush=True)
while True:
    ready, _, _ = select.select([inbox, sys.stdin], [], [])
    if inbox in ready:
        words = inbox.recv(200).decode().split(" ", 3)
        its, number, at = map(int, words[:3])
        count += 1
        if its > life:
            life, seen, back_at = its, [(number, at)], 0
            continue
        if may_go_back and number <= seen[-1][0] and at > max(at for _number, at in seen):
            seen, back_at, may_go_back = [(number, at)], at, False
            continue
        if at < back_at:
            continue
        place = bisect.bisect_left(seen, (number, 0))
        before = seen[place - 1] if place else (0, 0)
        after = seen[place] if place < len(seen) else (number + 1, at + 1)
        if may_repeat and its == life and (number, at) == after:
            may_repeat = False
        elif its < life or number == after[0] or not before[1] < at < after[1]:
            wrong.append("life %d: %d at %d, between %s and %s of life %d" % (its, number, at, before, after, life))
        elif len(words) > 3:
            wrong.append("wrong memory: " + words[3])
        else:
            seen.insert(place, (number, at))
            missing += number - before[0] - 1 if place == len(seen) - 1 else -1
    elif not (line := sys.stdin.readline()):
        break
    elif line.strip():
        may_go_back = may_repeat = line.strip() == "back"
    else:
        last = seen[-1][0] if seen else 0
        told = {"life": life, "last": last, "count": count, "missing": missing, "wrong": wrong[:5]}
        print(json.dumps(told), flush=True)
        wrong = []
"""


class Judge:
    """Outside of both hosts."""

    def __init__(self, hosts: TwoHosts) -> None:
        self._process = hosts.lab.popen(
            "client",
            [sys.executable, "-c", JUDGE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.missing = 0
        self.wrong: list[str] = []
        """What was wrong since this was last emptied."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self) -> dict[str, Any]:
        """``life`` and ``last`` number in it, ``count`` of all that came, ``missing`` of all lives."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        self.wrong += answer["wrong"]
        self.missing = int(answer["missing"])
        return answer

    def goes_on(self, within_s: float) -> bool:
        """Whether another number comes."""
        before = self.ask()
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            time.sleep(0.05)
            now = self.ask()
            if now["last"] != before["last"] or now["life"] > before["life"]:
                return True
        return False

    def may_go_back(self, may: bool) -> None:
        """Whether it may be taken back to its freeze, from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write("back\n" if may else "stay\n")
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def run_counter(hosts: TwoHosts, host: str, life: int) -> str:
    """Start the container; its id."""
    python = os.path.realpath("/usr/bin/python3")
    words = (python, "-I", "-c", COUNTER, hosts.client.address, str(life), str(MEMORY_MIB))
    return hosts.cmigrate(host, "run", "-d", "--name", NAME, "--rootfs", "host", "--", *words).stdout.strip()


class Pictures:
    """How each host looks, with and without the container: learnt from moves in which nothing dies."""

    def __init__(self, hosts: TwoHosts) -> None:
        self._hosts = hosts
        self._known: dict[tuple[str, str], Counter[str]] = {}

    def learn(self, container_id: str, at: str) -> None:
        """``at``: where the container runs, or "" when there is none."""
        for host in HOSTS:
            self._known[host, "with" if host == at else "without"] = self._take_still(host, container_id)

    def _take_still(self, host: str, container_id: str) -> Counter[str]:
        """When what ends by itself has ended."""
        seen: list[Counter[str]] = []
        while len(seen) < 3 or not seen[-1] == seen[-2] == seen[-3]:
            time.sleep(STILL_S)
            seen.append(self._take(host, container_id))
        return seen[-1]

    def left(self, container_id: str, at: str, grace_s: float) -> list[str]:
        """What either host has more, or less, than it should, after so long."""
        deadline = time.monotonic() + grace_s
        while True:
            found = [line for host in HOSTS for line in self._differences(host, container_id, at)]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.3)

    def _differences(self, host: str, container_id: str, at: str) -> list[str]:
        wanted = self._known[host, "with" if host == at else "without"]
        now = self._take(host, container_id)
        return [
            *(f"{host} has more: {item}" for item in sorted((now - wanted).elements())),
            *(f"{host} has lost: {item}" for item in sorted((wanted - now).elements())),
        ]

    def _take(self, host: str, container_id: str) -> Counter[str]:
        return Counter(_unnamed(self._hosts.picture(host), container_id))


def _unnamed(picture: Mapping[str, list[str]], container_id: str) -> list[str]:
    """Without what differs from move to move: pids, names of links, and addresses that the kernel makes up."""
    lines = []
    for kind, items in picture.items():
        for item in items:
            text = re.sub(r"^\d+ ", "", item) if kind == "process" else item
            # The monitor's one argument is the number of a descriptor.
            text = re.sub(r"(monitor\.py) \d+$", r"\1", text)
            text = re.sub(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", "MAC", text)
            if "fe80::" not in text:
                lines.append(f"{kind}: {text.replace(container_id, 'ID')}")
    return lines
