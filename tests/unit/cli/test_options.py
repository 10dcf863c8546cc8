import contextlib
import datetime
import signal
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.cli import options
from runtime.api import Limits, PortMapping, RestartPolicy, VolumeMount

NOW = datetime.datetime(2026, 1, 31, 12, 0, 0, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("64m", 64 << 20),
        ("64M", 64 << 20),
        ("64MiB", 64 << 20),
        ("64mb", 64 << 20),
        ("1.5g", 3 << 29),
        ("2k", 2048),
        ("10b", 10),
    ],
)
def test_sizes_are_understood_as_docker_does(text: str, size: int) -> None:
    assert options.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "m", "-1", "1x", "1 2", "banana", "1e9", "0x10"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        options.parse_bytes(text)


def test_no_limit_is_none_and_so_are_dockers_ways_to_say_it() -> None:
    assert options.parse_limits(None, None, None) == Limits()
    assert options.parse_limits("0", 0.0, -1) == Limits()
    assert options.parse_limits("64m", 1.5, 100) == Limits(memory_bytes=64 << 20, cpus=1.5, pids=100)


@pytest.mark.parametrize("limits", [("10k", None, None), (None, -1.0, None), (None, 0.001, None), (None, None, -5)])
def test_limits_nobody_could_live_with_are_refused(limits: tuple[Any, Any, Any]) -> None:
    with pytest.raises(click.UsageError):
        options.parse_limits(*limits)


def test_a_volume_is_a_path_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    wanted = VolumeMount(source=str(tmp_path / "data"), destination="/d")
    assert options.parse_volume(f"{tmp_path}/data:/d") == wanted
    assert options.parse_volume("./data:/d/") == wanted
    assert options.parse_volume("./data:/d:ro") == VolumeMount(source=wanted.source, destination="/d", read_only=True)


@pytest.mark.parametrize("text", ["/a", "a:/b", "/:b", "/:/b:rx", ":/b", "/nowhere-to-be-found:/b", "/:/b:ro:z"])
def test_other_volumes_are_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        options.parse_volume(text)


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("8080:80", PortMapping(host_port=8080, container_port=80)),
        ("53:53/udp", PortMapping(host_port=53, container_port=53, protocol="udp")),
        ("127.0.0.1:1:2/tcp", PortMapping(host_port=1, container_port=2, host_address="127.0.0.1")),
    ],
)
def test_ports_are_understood_as_docker_does(text: str, mapping: PortMapping) -> None:
    assert options.parse_port(text) == mapping


@pytest.mark.parametrize(
    "text",
    ["", "80", "80:", ":80", "0:80", "80:65536", "a:80", "80:80/sctp", "localhost:1:2", "1.2.3:1:2", "80-81:1-2"],
)
def test_other_ports_are_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        options.parse_port(text)


def test_the_last_of_a_variable_wins_and_files_come_first(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# comment\n\nA=file\nB=file\n  C=file\nHERE\n")
    environment = {"HERE": "from here", "D": "from here"}
    assert options.parse_env(["A=1", "D", "ABSENT", "E="], [file], environment) == (
        "A=1",
        "B=file",
        "C=file",
        "HERE=from here",
        "D=from here",
        "E=",
    )


@pytest.mark.parametrize("word", ["=x", "", "A=\0"])
def test_a_variable_without_a_name_is_refused(word: str) -> None:
    with pytest.raises(click.UsageError):
        options.parse_env([word], [], {})


def test_an_env_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="--env-file"):
        options.parse_env([], [tmp_path / "none"], {})


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("no", RestartPolicy()),
        ("always", RestartPolicy(name="always")),
        ("unless-stopped", RestartPolicy(name="unless-stopped")),
        ("on-failure", RestartPolicy(name="on-failure")),
        ("on-failure:3", RestartPolicy(name="on-failure", max_retries=3)),
    ],
)
def test_restart_policies_are_dockers(text: str, policy: RestartPolicy) -> None:
    assert options.parse_restart(text) == policy


@pytest.mark.parametrize("text", ["", "maybe", "always:3", "on-failure:", "on-failure:x"])
def test_other_restart_policies_are_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        options.parse_restart(text)


def test_a_rootfs_is_the_hosts_or_a_directory(tmp_path: Path) -> None:
    assert options.parse_rootfs("host") == "host"
    assert options.parse_rootfs(f"{tmp_path}/.") == str(tmp_path.resolve())
    with pytest.raises(click.UsageError):
        options.parse_rootfs(f"{tmp_path}/none")


def test_labels_tmpfs_names_and_profiles() -> None:
    assert options.parse_label("a=b=c") == ("a", "b=c")
    assert options.parse_label("a") == ("a", "")
    assert options.parse_tmpfs("/run/") == "/run"
    assert options.parse_name(None) == ""
    assert options.parse_security([]) == "default"
    assert options.parse_security(["seccomp=unconfined"]) == "unconfined"
    bad: list[tuple[Any, Any]] = [
        (options.parse_label, "=b"),
        (options.parse_tmpfs, "run"),
        (options.parse_tmpfs, "/run:size=1m"),
        (options.parse_name, "../x"),
        (options.parse_name, ""),
        (options.parse_security, ["apparmor=x"]),
    ]
    for parse, text in bad:
        with pytest.raises(click.UsageError):
            parse(text)


@pytest.mark.parametrize("text", ["KILL", "SIGKILL", "kill", "9"])
def test_a_signal_has_a_name_or_a_number(text: str) -> None:
    assert options.parse_signal(text) == signal.SIGKILL


@pytest.mark.parametrize("text", ["", "0", "65", "-9", "NOPE"])
def test_other_signals_are_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        options.parse_signal(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10m", "2026-01-31T11:50:00.000000Z"),
        ("1h30m", "2026-01-31T10:30:00.000000Z"),
        ("90", "2026-01-31T11:58:30.000000Z"),
        ("1.5s", "2026-01-31T11:59:58.500000Z"),
        ("2d", "2026-01-29T12:00:00.000000Z"),
        ("2026-01-31T13:00:00+02:00", "2026-01-31T11:00:00.000000Z"),
        ("2026-01-31T13:00:00Z", "2026-01-31T13:00:00.000000Z"),
    ],
)
def test_since_is_a_time_or_how_long_ago(text: str, expected: str) -> None:
    assert options.parse_since(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "10x", "m"])
def test_another_since_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        options.parse_since(text, NOW)
    assert options.parse_since(None, NOW) is None


def test_tail_is_a_number_or_all() -> None:
    assert options.parse_tail("all") is None
    assert options.parse_tail("0") == 0
    for text in ("-1", "x", ""):
        with pytest.raises(click.UsageError):
            options.parse_tail(text)


# No argument of a program holds a NUL.
@given(
    text=st.text(st.characters(exclude_characters="\0"), max_size=30) | st.from_regex(r"\A[0-9]{1,40}[dhmskg:/.]*\Z")
)
def test_no_text_makes_a_parser_fail_in_another_way(text: str) -> None:
    parsers: list[Any] = [
        options.parse_bytes,
        options.parse_memory,
        options.parse_port,
        options.parse_volume,
        options.parse_restart,
        options.parse_label,
        options.parse_tmpfs,
        options.parse_rootfs,
        options.parse_name,
        options.parse_signal,
        options.parse_tail,
        lambda value: options.parse_since(value, NOW),
        lambda value: options.parse_env([value], [], {}),
    ]
    for parse in parsers:
        with contextlib.suppress(click.UsageError):
            parse(text)
