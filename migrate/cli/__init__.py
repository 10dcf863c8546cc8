"""The command line. ``main`` is the entry point; each command's module is imported when that command is called.

stdout is for results, stderr for people; with ``--json`` stdout is one JSON object a line. docs/exit-codes.md has the
exit codes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from migrate.interrupts import ctrl_c_is_heard

# Name -> where its click command is, and its line in the list of commands. The line stands here a second time so that
# `cmigrate --help` imports none of these modules; a test compares them.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("migrate.cli.run:run_command", "Create a container and start it."),
    "ps": ("migrate.cli.containers:ps_command", "List containers."),
    "logs": ("migrate.cli.look:logs_command", "Show what a container has written."),
    "exec": ("migrate.cli.run:exec_command", "Run one more command in a running container."),
    "inspect": ("migrate.cli.containers:inspect_command", "Show everything about containers, as JSON."),
    "stats": ("migrate.cli.look:stats_command", "Show what containers use."),
    "top": ("migrate.cli.look:top_command", "Show a container's processes."),
    "stop": ("migrate.cli.containers:stop_command", "Stop containers: SIGTERM, and SIGKILL after a while."),
    "kill": ("migrate.cli.containers:kill_command", "Send a signal to containers."),
    "start": ("migrate.cli.containers:start_command", "Start containers that have ended."),
    "restart": ("migrate.cli.containers:restart_command", "Stop containers and start them again."),
    "pause": ("migrate.cli.containers:pause_command", "Freeze containers."),
    "unpause": ("migrate.cli.containers:unpause_command", "Thaw containers that were paused."),
    "wait": ("migrate.cli.containers:wait_command", "Wait until containers end; print their exit codes."),
    "rm": ("migrate.cli.containers:rm_command", "Remove containers."),
    "move": ("migrate.cli.move:move_command", "Move a running container to another host."),
    "plan": ("migrate.cli.plan:plan_command", "Predict what moving a container would take in each mode."),
    "cancel": ("migrate.cli.resolve:cancel_command", "Call off a move that is under way."),
    "undo": ("migrate.cli.resolve:undo_command", "Take back a container that was moved with --undo-window."),
    "resolve": ("migrate.cli.resolve:resolve_command", "Settle a move that broke off, or decide it."),
    "checkpoint": ("migrate.cli.portable:checkpoint_command", "Write a container to a file."),
    "restore": ("migrate.cli.portable:restore_command", "Bring a container back from a file."),
    "probe": (
        "migrate.cli.probe:probe_command",
        "Ask a service again and again and tell the longest time without an answer.",
    ),
    "history": ("migrate.cli.reports:history_command", "List the moves this host took part in."),
    "report": ("migrate.cli.reports:report_command", "Show the report of one move."),
    "doctor": ("migrate.cli.doctor:doctor_command", "Check what this host can do, and what it lacks."),
    "host": (
        "migrate.cli.host:host_group",
        "Hosts that this one can move containers to.",
    ),
    "network": ("migrate.cli.network:network_group", "User-defined networks."),
    "serve": (
        "migrate.cli.serve:serve_command",
        "Run this host's agent.",
    ),
    "lab": ("migrate.cli.lab:lab_group", "Several hosts on this machine."),
}

# Their arguments belong to another program: a --json there is not ours.
_PASSING_ON = (("run",), ("exec",), ("lab", "exec"))


class LazyGroup(click.Group):
    """Knows its commands by name and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"there is no command {args[0]!r}.{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_where, line) in COMMANDS.items()])


def print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"cmigrate {version('cmigrate')}")
        ctx.exit()


@click.group(
    "cmigrate",
    cls=LazyGroup,
    context_settings={"help_option_names": ["--help"], "max_content_width": 100},
    no_args_is_help=True,
)
@click.option(
    "--version", is_flag=True, callback=print_version, expose_value=False, is_eager=True, help="Show the version."
)
def cli() -> None:
    """Run Linux containers, checkpoint and restore them, and move them between hosts while they work.

    Exit code 0 from `move` means that the container runs on the target; docs/exit-codes.md has the others.
    """


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether errors go to stdout as JSON lines: decided without parsing, because parsing may be what failed."""
    ours = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    if any(tuple(ours[: len(words)]) == words for words in _PASSING_ON):
        return False
    return "--json" in ours


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Every error ends here as text a person can act on."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # numpy's library for matrices, which we have none of, starts a thread for each processor when it is imported;
    # they spin for 60 to 100 ms. Session processes of `serve` inherit this.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with ctrl_c_is_heard() as interrupts:
        try:
            result = cli.main(args=given, prog_name="cmigrate", standalone_mode=False)
            sys.stdout.flush()
            return result if isinstance(result, int) else 0
        except click.exceptions.Exit as stop:
            return stop.exit_code
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BrokenPipeError:
            # Whoever read our output has enough (head). Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        except BaseException as error:
            failure = error
    # Another Ctrl-C ends this process, with what has been said by then.
    from migrate.cli.output import fail

    return fail(failure, as_json=wants_json(given), interrupted=interrupts.asked)
