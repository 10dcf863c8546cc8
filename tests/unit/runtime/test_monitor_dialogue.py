"""What the monitor hears from the two processes on a container's way to its first instruction."""

import socket

import pytest

from runtime.sandbox.monitor import LaunchFailed, Monitor


@pytest.mark.parametrize("order", [(b"pid 7", b"ready"), (b"ready", b"pid 7")])
def test_either_process_may_be_the_first_to_speak(order: tuple[bytes, bytes]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for word in order:
            theirs.send(word)
        assert Monitor._expect(ours, "pid", "ready") == {"pid": "7", "ready": ""}


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ([b"pid 7", b"exit 127 no such program"], "no such program"),
        ([b"ready", b"ready"], "ended before"),
        ([], "ended before"),
    ],
)
def test_a_failure_is_told_whoever_spoke_before(said: list[bytes], what: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            for word in said:
                theirs.send(word)
        with pytest.raises(LaunchFailed, match=what):
            Monitor._expect(ours, "pid", "ready")
