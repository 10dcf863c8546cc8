"""Channels to children of this process."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

import transport
from transport.api import ChannelClosed, ConnectFailed, Deadline, Frame
from transport.local import spawn

TOP = Path(transport.__file__).parents[1]
PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(TOP)!r})
from transport.api import ChannelClosed, Deadline
from transport.local import from_stdio
with from_stdio() as channel:
    try:
        while True:
            frame = channel.receive(deadline=Deadline.after(20))
"""
ECHO = (
    PROGRAM + "            channel.send(frame, deadline=Deadline.after(20))\n    except ChannelClosed:\n        pass\n"
)
CHATTY = ECHO.replace(
    "            channel.send",
    "            print('stray'); sys.stdout.flush(); os.system('echo child')\n            channel.send",
)


def soon() -> Deadline:
    return Deadline.after(20)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_child_answers_over_its_stdin_and_stdout() -> None:
    with spawn(python(ECHO), name="echo") as channel:
        channel.send(Frame.control({"a": 1}, tag=4), deadline=soon())
        answer = channel.receive(deadline=soon())
        assert (answer.tag, answer.message()) == (4, {"a": 1})
        assert channel.peer.name == "echo"
        assert channel.peer.transport == "local"


def test_stray_output_of_a_child_and_of_its_children_goes_to_stderr() -> None:
    with spawn(python(CHATTY.replace("        pass", "        os._exit(7)"))) as channel:
        for number in range(3):
            channel.send(Frame.data(number, b"x"), deadline=soon())
            assert channel.receive(deadline=soon()) == Frame.data(number, b"x")


def test_reading_stdin_in_a_child_finds_the_end_of_a_file() -> None:
    code = ECHO.replace(
        "            channel.send(frame",
        "            frame = frame.data(1, sys.stdin.read().encode())\n            channel.send(frame",
    )
    with spawn(python(code)) as channel:
        channel.send(Frame.data(1, b"x"), deadline=soon())
        assert channel.receive(deadline=soon()) == Frame.data(1, b"")


def test_the_error_holds_exit_code_and_last_words_of_a_child_that_went_away() -> None:
    code = "import sys; print('x' * 100000, 'the disk is full', file=sys.stderr); sys.exit(3)"
    with spawn(python(code), name="agent") as channel:
        with pytest.raises(ChannelClosed, match=r"^agent closed .* exit code 3, .* the disk is full") as caught:
            channel.receive(deadline=soon())
        assert len(str(caught.value)) < 6000


def test_the_error_names_the_signal_that_killed_a_child() -> None:
    with (
        spawn(python("import os; os.kill(os.getpid(), 9)")) as channel,
        pytest.raises(ChannelClosed, match="killed by signal 9"),
    ):
        channel.receive(deadline=soon())


def test_a_program_that_is_not_there_is_an_error_at_once() -> None:
    with pytest.raises(ConnectFailed, match="cannot start /does/not/exist: No such file"):
        spawn(["/does/not/exist"])


def test_close_waits_for_a_child_that_ends_by_itself(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"import sys, time; sys.stdin.read(); time.sleep(0.2); open({str(mark)!r}, 'w').close()"
    spawn(python(code)).close()
    assert mark.exists()


def test_close_kills_a_child_that_does_not_end() -> None:
    channel = spawn(python("import time; time.sleep(100)"), close_grace_s=0.2)
    begin_s = time.monotonic()
    channel.close()
    assert 0.15 < time.monotonic() - begin_s < 30


def test_a_child_gets_the_environment_that_was_named_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    code = "import os, sys; sys.exit(' '.join(sorted(os.environ)))"
    with spawn(python(code)) as channel, pytest.raises(ChannelClosed) as caught:
        channel.receive(deadline=soon())
    assert "SECRET" not in str(caught.value)
    with spawn(python(code), environment={"ONLY": "1"}) as channel, pytest.raises(ChannelClosed, match="ONLY"):
        channel.receive(deadline=soon())
