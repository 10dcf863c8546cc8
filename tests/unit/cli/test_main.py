import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from migrate import cli
from migrate.cli import COMMANDS, main, wants_json
from migrate.cli.output import error_lines, fail, for_each, human_bytes, print_table
from migrate.errors import MoveRefused, describe
from runtime.errors import CriuFailed, NotFound, WrongState

TOP = Path(__file__).resolve().parents[3]
CMIGRATE = [sys.executable, "-c", "import sys; from migrate.cli import main; sys.exit(main())"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CMIGRATE, *arguments], cwd=TOP, timeout=60, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_its_line_in_the_list_begins_its_own_help(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(limit=200).startswith(COMMANDS[name][1].removesuffix("."))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_without_root_or_settings(name: str) -> None:
    result = CliRunner().invoke(cli.cli, [name, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: cmigrate {name}")


def test_the_list_of_commands_imports_none_of_them() -> None:
    program = (
        "import sys; from migrate.cli import main; main(['--help'])\n"
        "ours = sorted(n for n in sys.modules if n.split('.')[0] in ('migrate', 'runtime', 'transport'))\n"
        "assert ours == ['migrate', 'migrate.cli', 'migrate.interrupts'], ours\n"
        "assert not {'paramiko', 'rich', 'cryptography', 'msgpack'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_help_is_there_at_once() -> None:
    """About 50 ms on an idle machine; the best of a few, because the machine may be busy."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        assert run("--help").returncode == 0
        times.append(time.perf_counter() - begin)
    assert min(times) < 2


def test_the_version_is_told() -> None:
    assert run("--version").stdout.startswith("cmigrate 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["teleport"],
        ["run"],
        ["run", "--memory", "banana", "--", "true"],
        ["run", "--no-such-option", "--", "true"],
        ["run", "--rm", "--restart", "always", "--", "true"],
        ["run", "--network", "none", "-p", "1:1", "--", "true"],
        ["exec", "web1"],
        ["exec", "web1", "--"],
        ["move", "web1"],
        ["move", "web1", "--to", "host2", "--mode", "warp"],
        ["checkpoint", "web1"],
        ["stop"],
        ["stop", "-t", "-1", "web1"],
        ["kill", "-s", "NOPE", "web1"],
        ["logs", "--tail", "x", "web1"],
        ["history", "-n", "0"],
    ],
)
def test_what_was_given_wrongly_ends_with_2_and_two_lines(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    error, hint = shown.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: see cmigrate")


def test_a_misspelt_command_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mvoe"]) == 2
    assert "Did you mean 'move'?" in capsys.readouterr().err


def test_with_json_an_error_is_one_line_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["move", "web1", "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.err == ""
    (line,) = shown.out.splitlines()
    assert json.loads(line) == {
        "type": "error",
        "code": "usage",
        "exit_code": 2,
        "what": "Missing option '--to'.",
        "hint": "see cmigrate move --help",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ps --json", True),
        ("ps", False),
        ("lab status --json", True),
        ("run -d -- prog --json", False),
        ("run prog --json", False),
        ("exec web1 prog --json", False),
        ("lab exec host1 -- cmigrate ps --json", False),
        ("lab exec host1 cmigrate ps --json", False),
        ("logs web1 -- --json", False),
    ],
)
def test_a_json_that_belongs_to_another_program_is_not_ours(words: str, expected: bool) -> None:
    assert wants_json(words.split()) is expected


def test_an_error_is_told_with_what_criu_said_and_every_blocker() -> None:
    assert error_lines(describe(CriuFailed("no", hint="do x", log_lines=("Error (a): b",)))) == [
        "error: no",
        "    Error (a): b",
        "hint: do x",
    ]
    blockers = [{"what": "name taken", "remedy": "rename"}, {"what": "no room", "remedy": ""}]
    assert error_lines(describe(MoveRefused("can not move", blockers=blockers))) == [
        "error: can not move",
        "  - name taken",
        "    rename",
        "  - no room",
    ]


def test_an_error_nobody_foresaw_shows_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        raise ZeroDivisionError("x")
    assert fail(caught.value, as_json=False) == 1
    shown = capsys.readouterr().err
    assert "test_main.py" in shown
    assert shown.splitlines()[-1] == "error: ZeroDivisionError: x"


def test_one_that_fails_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def act(name: str) -> str:
        if name == "b":
            raise WrongState("b runs")
        if name == "c":
            raise NotFound("no c")
        return name

    with pytest.raises(SystemExit) as stop:
        for_each(["a", "b", "c", "d"], act)
    assert stop.value.code == 4
    shown = capsys.readouterr()
    assert shown.out.split() == ["a", "d"]
    assert "error: b runs" in shown.err
    assert "error: no c" in shown.err


def test_without_root_the_error_says_so() -> None:
    # Everything is imported first: another user may not be able to read this checkout.
    program = (
        "import os, sys; from migrate.cli import main; import migrate.cli.containers, migrate.errors, runtime.host\n"
        "os.geteuid() or os.setresuid(65534, 65534, 65534)\n"
        "sys.exit(main(['ps']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=False)
    assert ended.returncode == 4
    assert ended.stderr.startswith("error: this needs root")
    assert "hint: sudo" in ended.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [*CMIGRATE, "--help"], cwd=TOP, timeout=60, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert ended.returncode == 1
    assert ended.stderr == ""


def test_a_table_is_as_wide_as_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("A", "LONG"), [("aaaa", "b"), ("", "c")])
    assert capsys.readouterr().out == "A      LONG\naaaa   b\n       c\n"


def test_sizes_are_told_as_docker_tells_them() -> None:
    assert [human_bytes(n) for n in (None, 0, 1023, 1 << 20, 5 << 40)] == ["--", "0B", "1023B", "1.0MiB", "5.0TiB"]


def test_interrupted_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(KeyboardInterrupt(), as_json=False) == 130
    assert fail(click.Abort(), as_json=False) == 130
    assert "error: interrupted" in capsys.readouterr().err


def test_what_a_library_made_of_ctrl_c_is_told_as_that(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("Event loop stopped before Future completed.")
    assert fail(error, as_json=False, interrupted=True) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_an_error_that_means_something_is_told_also_when_ctrl_c_came(capsys: pytest.CaptureFixture[str]) -> None:
    error = NotFound("there is no container web1")
    assert fail(error, as_json=False, interrupted=True) == describe(error).exit_code
    assert "web1" in capsys.readouterr().err
