"""The decisive lines of CRIU's log, and what they mean to an operator. Parses text only."""

from __future__ import annotations

import re
from collections.abc import Sequence

from runtime.errors import CriuFailed

# At low log levels CRIU writes no time stamps.
_LINE = re.compile(r"^(?:\(\d+\.\d+\)\s*)?(?:\d+:\s*)?(?P<text>Error \([^)]*\):.*)$")
# Said on every host without CAP_SYS_RESOURCE, and harmless there.
_HARMLESS = ("rlimit: Can't setup RLIMIT_NOFILE",)
# What only says that something before it went wrong.
_AFTERMATH = ("Dumping FAILED", "Restoring FAILED", "Unable to kill", "Failed to unlock network")
MAX_LINES = 8

# Part of a line -> what to do. First match wins.
HINTS: tuple[tuple[str, str], ...] = (
    ("io_uring", "the program uses io_uring, which CRIU cannot dump; run it with the default seccomp profile"),
    ("Can't get rlimit", "the host lacks CAP_SYS_RESOURCE: run the container with its own user namespace"),
    ("External socket is used", "a unix socket leads out of the container; close it or mount the peer's directory"),
    ("Unsupported proto 262", "an MPTCP socket; containers of ours have MPTCP off: was it switched on inside?"),
    ("inside of its pid namespace", "the container's first process must lead its session"),
    ("build-id", "the program's file differs on this host: install the same version on both"),
    ("has bad size", "a file of the lower layer differs on this host: make the rootfs the same on both"),
    ("has bad mode", "a file of the lower layer differs on this host: make the rootfs the same on both"),
    ("Can't open file", "a file that the container has open is missing on this host: is its rootfs the same?"),
    ("No space left", "make room and try again"),
    ("Can't set mount", "mounts could not be restored; compare the kernels of both hosts with cmigrate doctor"),
    ("Can't bind inet", "the container's address or port is missing on this host"),
    ("tty", "a terminal is open in the container: run it without one"),
    ("nft", "nftables does not work here: install nftables or load nf_tables"),
)


def decisive_lines(text: str) -> tuple[str, ...]:
    """The error lines of a log, first cause first, without time stamps, repetitions and noise."""
    found: list[str] = []
    for raw in text.splitlines():
        match = _LINE.match(raw.strip())
        line = match["text"] if match else ""
        if line and not any(part in line for part in (*_HARMLESS, *_AFTERMATH)) and line not in found:
            found.append(line)
    return tuple(found[:MAX_LINES])


def hint_for(lines: Sequence[str]) -> str:
    """What an operator can do about these lines; empty when nothing is known."""
    return next((hint for part, hint in HINTS for line in lines if part in line), "")


def failure(operation: str, log_text: str, errno: int = 0) -> CriuFailed:
    """The error to raise after CRIU refused ``operation`` ("dump", "restore")."""
    lines = decisive_lines(log_text)
    cause = f": {lines[0].partition('): ')[2]}" if lines else f" (error {errno})" if errno else ""
    return CriuFailed(f"CRIU could not {operation} the container{cause}", hint=hint_for(lines), log_lines=lines)
