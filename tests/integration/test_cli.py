"""The command line with real containers: what it prints, what it ends with, what it leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

CMIGRATE = [sys.executable, "-c", "import sys; from migrate.cli import main; sys.exit(main())"]
BRIDGE = "cmtcli0"
CONFIG = """
name = "clihost"
state_dir = "{state}"
run_dir = "/run/cmigrate-cli"
bridge = "{bridge}"
subnet = "10.93.0.0/24"
gateway = "10.93.0.1"
"""

Cli = Callable[..., subprocess.CompletedProcess[str]]


def has_table() -> bool:
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, timeout=20, check=False).stdout
    return "table ip cmigrate\n" in tables


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A host of our own beside any other: its settings, state, run directory and bridge."""
    directory = tmp_path_factory.mktemp("cli")
    (directory / "config.toml").write_text(CONFIG.format(state=directory / "state", bridge=BRIDGE))
    had_table = has_table()
    values = {**os.environ, "CMIGRATE_CONFIG": str(directory)}
    # Bridge and table stay after the first container, as on any host.
    subprocess.run([*CMIGRATE, "run", "--rm", "--", "true"], env=values, timeout=60, check=True)
    yield values
    # The kernel may be busy with network namespaces that just went.
    subprocess.run(["ip", "link", "del", BRIDGE], timeout=60, check=True)
    if not had_table:
        subprocess.run(["nft", "delete", "table", "ip", "cmigrate"], timeout=60, check=False)
    shutil.rmtree("/run/cmigrate-cli", ignore_errors=True)


@pytest.fixture
def cmigrate(environment: dict[str, str]) -> Iterator[Cli]:
    def run(*words: str, stdin: str = "", code: int | None = 0) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [*CMIGRATE, *words], env=environment, input=stdin, capture_output=True, text=True, timeout=60, check=False
        )
        assert code is None or ended.returncode == code, ended
        return ended

    yield run
    left = run("ps", "-a", "-q").stdout.split()
    if left:
        run("rm", "-f", *left)


def ids(cmigrate: Cli, *options: str) -> list[str]:
    return cmigrate("ps", "-q", *options).stdout.split()


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_foreground_run_passes_output_and_exit_code_on(cmigrate: Cli) -> None:
    ended = cmigrate("run", "--rm", "--", "sh", "-c", "echo out; echo err >&2; sleep 0.3; echo late; exit 7", code=7)
    assert ended.stdout == "out\nlate\n"
    assert ended.stderr == "err\n"
    assert ids(cmigrate, "-a") == []


@pytest.mark.parametrize("detach", [[], ["-d"]])
@pytest.mark.parametrize(("command", "code"), [("no-such-program", 127), ("/etc", 126)])
def test_a_command_that_can_not_run_ends_as_with_docker(
    cmigrate: Cli, detach: Sequence[str], command: str, code: int
) -> None:
    ended = cmigrate("run", "--no-init", *detach, "--", command, code=code)
    assert command in ended.stderr
    assert ids(cmigrate, "-a") == []


def test_our_own_failure_is_125_where_lower_codes_are_the_programs(cmigrate: Cli) -> None:
    assert "not in 10.93.0.0/24" in cmigrate("run", "--ip", "192.0.2.1", "--", "true", code=125).stderr
    cmigrate("run", "-d", "--ip", "192.0.2.1", "--", "true", code=2)
    assert "hint:" in cmigrate("exec", "nobody", "true", code=125).stderr


def test_a_container_ended_by_a_signal_ends_with_128_and_its_number(cmigrate: Cli) -> None:
    cmigrate("run", "--rm", "--", "sh", "-c", "kill -9 $$", code=137)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_container_and_shows_its_last_words(
    cmigrate: Cli, environment: dict[str, str], number: signal.Signals
) -> None:
    program = "trap 'echo bye; exit 9' TERM; echo go; while true; do sleep 0.05; done"
    running = subprocess.Popen(
        [*CMIGRATE, "run", "--rm", "--", "sh", "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    with running:
        assert running.stdout is not None
        assert running.stdout.readline() == "go\n"
        running.send_signal(number)
        assert running.stdout.read() == "bye\n"
        assert running.wait(30) == 9
    assert ids(cmigrate, "-a") == []


def test_a_reader_that_has_enough_ends_the_container(cmigrate: Cli, environment: dict[str, str]) -> None:
    running = subprocess.Popen([*CMIGRATE, "run", "--rm", "--", "yes"], env=environment, stdout=subprocess.PIPE)
    with running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"y\n"
        running.stdout.close()
        assert running.wait(30) == 141
    assert ids(cmigrate, "-a") == []


def test_the_life_of_a_container(cmigrate: Cli) -> None:
    container_id = cmigrate("run", "-d", "--name", "life", "-m", "64m", "--", "sleep", "1000").stdout.strip()
    assert ids(cmigrate) == [container_id]
    table = cmigrate("ps").stdout.splitlines()
    assert table[0].split()[:2] == ["CONTAINER", "ID"]
    assert "life" in table[1]
    assert "Up" in table[1]
    assert "name_taken" not in table[1]
    cmigrate("run", "-d", "--name", "life", "--", "sleep", "1000", code=4)

    cmigrate("pause", "life")
    assert lines(cmigrate("ps", "--json").stdout)[0]["status"] == "paused"
    cmigrate("pause", "life", code=4)
    cmigrate("unpause", "life")

    (stats,) = lines(cmigrate("stats", "--no-stream", "--json", "life").stdout)
    assert stats["pids"] == 2
    assert stats["memory_limit_bytes"] == 64 << 20
    processes = lines(cmigrate("top", "--json", "life").stdout)
    assert [process["pid"] for process in processes] == [1, 2]
    assert "sleep 1000" in str(processes[1]["command"])

    spec = json.loads(cmigrate("inspect", "life").stdout)["spec"]
    assert spec["limits"]["memory_bytes"] == 64 << 20
    assert lines(cmigrate("inspect", "--json", "life", container_id[:6]).stdout)[1]["id"] == container_id

    assert "stop it first" in cmigrate("rm", "life", code=4).stderr
    assert cmigrate("stop", "-t", "1", "life").stdout == "life\n"
    assert ids(cmigrate) == []
    assert "Exited (143)" in cmigrate("ps", "-a").stdout
    assert cmigrate("wait", "life").stdout == "143\n"
    assert cmigrate("start", "life").stdout == "life\n"
    assert cmigrate("kill", "-s", "KILL", "life").stdout == "life\n"
    assert cmigrate("wait", "life").stdout == "137\n"
    ended = cmigrate("rm", "life", "nobody", code=3)
    assert ended.stdout == "life\n"
    assert "nobody" in ended.stderr


def test_exec_passes_input_output_and_exit_code_on(cmigrate: Cli) -> None:
    cmigrate("run", "-d", "--name", "ex", "-e", "A=1", "--", "sleep", "1000")
    ended = cmigrate(
        "exec",
        "-i",
        "-e",
        "B=2",
        "-w",
        "/usr",
        "ex",
        "--",
        "sh",
        "-c",
        "cat; echo $A$B $PWD; exit 3",
        stdin="in\n",
        code=3,
    )
    assert ended.stdout == "in\n12 /usr\n"
    cmigrate("exec", "ex", "no-such-program", code=127)
    cmigrate("exec", "-u", "65534:65534", "ex", "sh", "-c", "test $(id -u) = 65534")
    cmigrate("exec", "-d", "ex", "sleep", "999")
    assert any("sleep 999" in str(line["command"]) for line in lines(cmigrate("top", "--json", "ex").stdout))
    cmigrate("stop", "-t", "0", "ex")
    cmigrate("exec", "ex", "true", code=125)


def test_logs_are_followed_until_the_end_and_cut_as_asked(cmigrate: Cli) -> None:
    cmigrate("run", "-d", "--name", "log", "--", "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.2; done; echo e >&2")
    ended = cmigrate("logs", "-f", "log")
    assert (ended.stdout, ended.stderr) == ("1\n2\n3\n", "e\n")
    assert cmigrate("logs", "-n", "2", "log").stdout == "3\n"
    assert cmigrate("logs", "--since", "2100-01-01T00:00:00Z", "log").stdout == ""
    stamped = cmigrate("logs", "-t", "log").stdout.splitlines()[0]
    assert stamped.endswith(" 1")
    assert stamped[:2] == "20"
    assert [line["text"] for line in lines(cmigrate("logs", "--json", "log").stdout)] == ["1", "2", "3", "e"]


def test_what_is_not_there_is_said_in_json_too(cmigrate: Cli) -> None:
    for words in (["logs"], ["inspect"], ["top"], ["stats"], ["move", "--to", "nowhere"]):
        (line,) = lines(cmigrate(*words, "nobody", "--json", code=3).stdout)
        assert line["type"] == "error"
        assert line["code"] == "not-found"
        assert line["exit_code"] == 3


def test_a_move_to_nowhere_leaves_the_container_as_it_was(cmigrate: Cli) -> None:
    cmigrate("run", "-d", "--name", "stay", "--", "sleep", "1000")
    assert "cmigrate host add" in cmigrate("move", "stay", "--to", "nowhere", code=3).stderr
    assert lines(cmigrate("ps", "--json").stdout)[0]["status"] == "running"


def test_a_host_without_moves_has_no_history(cmigrate: Cli) -> None:
    assert cmigrate("history", "--json").stdout == ""
    assert "REPORT" in cmigrate("history").stdout
    cmigrate("report", "abc", code=3)


def test_two_starts_at_once_start_it_once(cmigrate: Cli, environment: dict[str, str]) -> None:
    cmigrate("run", "-d", "--name", "twice", "--", "sleep", "1000")
    cmigrate("stop", "-t", "0", "twice")
    both = [
        subprocess.Popen([*CMIGRATE, "start", "twice"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for one in both:
        one.communicate(timeout=60)
    assert sorted(one.returncode for one in both) == [0, 4]
    time.sleep(0.1)
    assert len(lines(cmigrate("top", "--json", "twice").stdout)) == 2


def test_a_rootfs_of_its_own_is_used(cmigrate: Cli, tmp_path: Path) -> None:
    """A root with one static program in it: nothing of the host's is needed."""
    root = tmp_path / "root"
    for name in ("bin", "dev", "proc", "sys", "tmp", "etc", "run"):
        (root / name).mkdir(parents=True)
    shutil.copy("/usr/bin/tini-static", root / "bin" / "tini")
    assert (
        "tini version"
        in cmigrate("run", "--rm", "--no-init", "--rootfs", str(root), "--", "/bin/tini", "--version").stdout
    )
