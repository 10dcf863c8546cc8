"""What commands make of their options and of containers, without any container."""

import dataclasses
import datetime
import io
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console

from migrate.cli.containers import container_line, status_text, table_row
from migrate.cli.look import Sample, stats_row
from migrate.cli.output import ago
from migrate.cli.run import RUN_OPTIONS, run_command, spec_fields
from migrate.cli.tables import print_report
from runtime.api import (
    Container,
    ContainerSpec,
    ContainerState,
    Limits,
    NetworkSpec,
    PortMapping,
    RestartPolicy,
    Status,
    VolumeMount,
)
from tests.unit.migrate.test_report import FAILED, REPORT

STARTED = "2026-01-31T11:55:00.000Z"
NOW = datetime.datetime(2026, 1, 31, 12, 0, 0, tzinfo=datetime.UTC).timestamp()
SPEC = ContainerSpec(
    id="0123456789ab",
    name="web1",
    rootfs="host",
    argv=("nginx", "-g", "daemon off; worker_processes 2;"),
    created_at="2026-01-31T10:00:00.000Z",
    ports=(PortMapping(host_port=8080, container_port=80),),
    network=NetworkSpec(address="10.88.0.7/16", mac="02:42:0a:58:00:07", gateway="10.88.0.1"),
    labels=(("a", "b"),),
)
RUNNING = Container(spec=SPEC, state=ContainerState(status=Status.RUNNING, started_at=STARTED))


def options_of(*arguments: str) -> dict[str, Any]:
    """What click makes of a command line of ``run``."""
    context = run_command.make_context("run", [*arguments, "--", "true"])
    return {name: value for name, value in context.params.items() if name not in ("command", "detach")}


def test_without_options_the_defaults_are_the_specs_own() -> None:
    fields = spec_fields(options_of())
    own = ("ip", "ip6", "network", "network_name", "name", "env", "rootfs")
    spec = ContainerSpec(
        id="0123456789ab",
        name="x",
        argv=("true",),
        created_at="",
        rootfs="host",
        **{k: v for k, v in fields.items() if k not in own},
    )
    plain = ContainerSpec(id="0123456789ab", name="x", argv=("true",), created_at="", rootfs="host")
    assert spec == plain
    assert {name: fields[name] for name in own} == {
        "ip": "",
        "ip6": "",
        "network": True,
        "network_name": "",
        "name": "",
        "env": (),
        "rootfs": "host",
    }


def test_every_option_of_run_reaches_the_spec(tmp_path: Path) -> None:
    fields = spec_fields(
        options_of(
            *("--name", "web1", "--rootfs", str(tmp_path), "-e", "A=1", "--env", "B=2", "-w", "/srv", "-u", "33:33"),
            *(
                "-v",
                f"{tmp_path}:/data:ro",
                "--tmpfs",
                "/run",
                "-p",
                "8080:80",
                "--hostname",
                "h",
                "--ip",
                "10.88.0.9",
                "--ip6",
                "fd00:88::9",
            ),
            *("-m", "64m", "--cpus", "1.5", "--pids-limit", "50", "--read-only", "--cap-add", "NET_ADMIN"),
            *("--cap-drop", "ALL", "--security-opt", "seccomp=unconfined", "--userns", "host", "--no-init"),
            *("--restart", "on-failure:3", "--label", "x=y"),
        )
    )
    assert fields == {
        "name": "web1",
        "rootfs": str(tmp_path.resolve()),
        "env": ("A=1", "B=2"),
        "cwd": "/srv",
        "user": "33:33",
        "hostname": "h",
        "volumes": (VolumeMount(source=str(tmp_path), destination="/data", read_only=True),),
        "tmpfs": ("/run",),
        "ports": (PortMapping(host_port=8080, container_port=80),),
        "read_only": True,
        "cap_add": ("NET_ADMIN",),
        "cap_drop": ("ALL",),
        "limits": Limits(memory_bytes=64 << 20, cpus=1.5, pids=50),
        "restart": RestartPolicy(name="on-failure", max_retries=3),
        "userns": "host",
        "seccomp": "unconfined",
        "init": False,
        "auto_remove": False,
        "labels": (("x", "y"),),
        "ip": "10.88.0.9",
        "ip6": "fd00:88::9",
        "network": True,
        "network_name": "",
    }


def test_the_names_docker_users_know_are_all_there() -> None:
    names = {name for parameter in run_command.params for name in parameter.opts}
    known = "-d --name -e -w -u -v -p --hostname --memory -m --cpus --pids-limit --read-only --cap-drop --cap-add --ip"
    more = "--rm --restart --rootfs --tmpfs --userns --no-init --security-opt --label --env-file --detach --env"
    assert set(f"{known} {more} --workdir --user --volume --publish".split()) <= names
    assert len(RUN_OPTIONS) == len(run_command.params) - 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["nginx", "-g", "daemon off;"],
        ["--", "nginx", "-g", "daemon off;"],
    ],
)
def test_options_behind_the_command_belong_to_the_command(arguments: list[str]) -> None:
    context = run_command.make_context("run", ["-d", *arguments])
    assert context.params["command"] == ("nginx", "-g", "daemon off;")
    assert context.params["detach"] is True


@pytest.mark.parametrize(
    "arguments", [["--rm", "--restart", "always"], ["--network", "none", "--ip", "10.88.0.9"], ["-v", "data:/data"]]
)
def test_options_that_contradict_each_other_are_refused(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        spec_fields(options_of(*arguments))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "Up 5 minutes"),
        ({"status": Status.PAUSED}, "Up 5 minutes (Paused)"),
        (
            {"status": Status.EXITED, "exit_code": 0, "finished_at": "2026-01-31T09:59:00.000Z"},
            "Exited (0) 2 hours ago",
        ),
        ({"status": Status.EXITED, "exit_code": None}, "Exited (?)"),
        ({"status": Status.MOVED, "moved_to": "host2"}, "Moved to host2"),
        ({"status": Status.CREATED}, "Created"),
    ],
)
def test_a_status_reads_as_dockers(changes: dict[str, Any], text: str) -> None:
    state = dataclasses.replace(RUNNING.state, **changes)
    assert status_text(dataclasses.replace(RUNNING, state=state), NOW) == text


def test_a_row_of_ps_is_short_unless_asked() -> None:
    row = table_row(RUNNING, NOW)
    assert row[0] == "0123456789ab"
    assert row[2] == "nginx -g 'daemon off; worker_…"
    assert row[3:] == ("2 hours ago", "Up 5 minutes", "10.88.0.7", "0.0.0.0:8080->80/tcp", "web1")
    assert table_row(RUNNING, NOW, full=True)[2] == "nginx -g 'daemon off; worker_processes 2;'"


def test_a_program_of_several_lines_is_one_row_of_ps() -> None:
    spec = dataclasses.replace(RUNNING.spec, argv=("python3", "-c", "import os\nos.pause()"))
    row = table_row(dataclasses.replace(RUNNING, spec=spec), NOW, full=True)
    assert row[2] == "python3 -c 'import os os.pause()'"


def test_a_line_of_ps_has_what_a_script_needs() -> None:
    line = container_line(RUNNING)
    assert line["type"] == "container"
    assert line["status"] == "running"
    assert line["address"] == "10.88.0.7/16"
    assert line["labels"] == {"a": "b"}
    bare = dataclasses.replace(RUNNING, spec=dataclasses.replace(SPEC, network=None))
    assert container_line(bare)["address"] == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (1, "1 second"),
        (59, "59 seconds"),
        (61, "1 minute"),
        (119, "1 minute"),
        (120, "2 minutes"),
        (7199, "119 minutes"),
        (7200, "2 hours"),
        (86400 * 3, "3 days"),
        (86400 * 30, "4 weeks"),
        (-5, "0 seconds"),
    ],
)
def test_how_long_ago_is_told_in_one_unit(seconds: float, text: str) -> None:
    at = datetime.datetime.fromtimestamp(NOW - seconds, datetime.UTC).isoformat()
    assert ago(at, NOW) == text
    assert ago("", NOW) == ""


def sample(at_s: float, cpu_usage_s: float | None, **changes: Any) -> Sample:
    fields: dict[str, Any] = {"memory_bytes": 32 << 20, "memory_limit_bytes": 64 << 20, "pids": 3, **changes}
    return Sample(container_id="0123456789ab", name="web1", at_s=at_s, cpu_usage_s=cpu_usage_s, **fields)


def test_processor_use_is_of_one_processor_between_two_samples() -> None:
    assert sample(12.0, 4.0).cpu_percent(sample(10.0, 1.0)) == 150.0
    assert sample(12.0, 4.0).cpu_percent(None) is None
    assert sample(12.0, None).cpu_percent(sample(10.0, 1.0)) is None
    assert sample(10.0, 1.0).cpu_percent(sample(10.0, 1.0)) is None


def test_what_the_host_does_not_count_is_shown_as_not_known() -> None:
    assert stats_row(sample(2.0, 1.0), sample(1.0, 0.5)) == (
        "0123456789ab",
        "web1",
        "50.00%",
        "32.0MiB / 64.0MiB",
        "50.00%",
        "3",
    )
    unknown = sample(2.0, None, memory_bytes=None, memory_limit_bytes=None)
    assert stats_row(unknown, None)[2:5] == ("--", "-- / --", "--")
    assert unknown.to_json(None)["cpu_percent"] is None


def test_a_report_is_a_table_with_everything_in_it() -> None:
    stream = io.StringIO()
    print_report(REPORT, Console(file=stream, width=100))
    text = stream.getvalue()
    for part in ("web1", "host1 -> host2", "diskless, stream", "migrated", "61.5 ms", "64.0MiB", "prepare", "0.1.0"):
        assert part in text


def test_a_failed_report_shows_the_error_and_takes_no_text_for_markup() -> None:
    stream = io.StringIO()
    error = dataclasses.replace(FAILED.error, what="no [bold]file[/bold]") if FAILED.error else None
    print_report(dataclasses.replace(FAILED, error=error, container="[red]x"), Console(file=stream, width=100))
    text = stream.getvalue()
    assert "error: no [bold]file[/bold]" in text
    assert "[red]x" in text
    assert "Error (x): y" in text
    assert "taken" in text
    assert "rolled_back" in text
