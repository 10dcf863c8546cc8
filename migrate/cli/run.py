"""`cmigrate run` and `cmigrate exec`: programs whose exit code becomes ours."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from runtime.api import Container
    from runtime.container import Containers

PASS_ON = {"allow_interspersed_args": False}
EXIT_CMIGRATE = 125
"""As docker: our own failure, where every other number may be the program's."""
EXIT_SIGPIPE = 128 + signal.SIGPIPE
REMOVED_WAIT_S, REMOVED_POLL_S = 10.0, 0.02

RUN_OPTIONS = (
    click.option("-d", "--detach", is_flag=True, help="Do not wait; print the container's id."),
    click.option("--name", metavar="NAME", help="Name; one is made up without it."),
    click.option("--rootfs", metavar="DIR|host", default="host", show_default=True, help="Lower layer of the root."),
    click.option("-e", "--env", metavar="KEY[=VALUE]", multiple=True, help="Set or pass on a variable."),
    click.option("--env-file", type=click.Path(path_type=Path), multiple=True, help="Variables, one a line."),
    click.option("-w", "--workdir", metavar="DIR", default="/", help="Directory to start in."),
    click.option("-u", "--user", metavar="USER[:GROUP]", default="0:0", help="Who the program runs as."),
    click.option("-v", "--volume", metavar="SOURCE:DESTINATION[:ro]", multiple=True, help="Mount a path of this host."),
    click.option("--tmpfs", metavar="PATH", multiple=True, help="Mount an empty tmpfs; it moves along."),
    click.option("-p", "--publish", metavar="[ADDRESS:]PORT:PORT[/udp]", multiple=True, help="Publish a port."),
    click.option("--hostname", metavar="NAME", default="", help="Host name inside (default: the name)."),
    click.option("--ip", metavar="ADDRESS", default="", help="The container's address; it moves along."),
    click.option("--ip6", metavar="ADDRESS[/LENGTH]", default="", help="An IPv6 address beside it; it moves along."),
    click.option("--network", metavar="bridge|none|NAME", default="bridge", help="none: only loopback; or a user's."),
    click.option("-m", "--memory", metavar="SIZE", help="Memory limit: 512m, 2g."),
    click.option("--cpus", type=float, metavar="N", help="Processors it may use: 0.5, 2."),
    click.option("--pids-limit", type=int, metavar="N", help="How many processes and threads it may have."),
    click.option("--read-only", is_flag=True, help="Mount the root read-only."),
    click.option("--cap-add", metavar="CAP", multiple=True, help="Give a capability, or ALL."),
    click.option("--cap-drop", metavar="CAP", multiple=True, help="Take a capability away, or ALL."),
    click.option("--security-opt", metavar="OPT", multiple=True, help="seccomp=unconfined switches the filter off."),
    click.option("--userns", type=click.Choice(["private", "host"]), default="private", help="User namespace."),
    click.option("--no-init", is_flag=True, help="COMMAND itself is process 1, without an init that reaps."),
    click.option("--rm", "auto_remove", is_flag=True, help="Remove the container when it has ended."),
    click.option("--restart", metavar="POLICY", default="no", help="no, always, on-failure[:N], unless-stopped."),
    click.option("--label", metavar="KEY=VALUE", multiple=True, help="Note something about the container."),
)


def with_options(function: Any) -> Any:
    for option in reversed(RUN_OPTIONS):
        function = option(function)
    return function


def spec_fields(options: dict[str, Any]) -> dict[str, Any]:
    """What ``runtime.specify.new_spec`` takes, from the parsed options of ``run``. Raises click.UsageError."""
    from migrate.cli import options as words

    restart = words.parse_restart(options["restart"])
    if options["auto_remove"] and restart.name != "no":
        raise click.UsageError("--rm and --restart contradict each other")
    if options["network"] == "none" and (options["publish"] or options["ip"] or options["ip6"]):
        raise click.UsageError("--network none has neither --ip nor --ip6 nor ports to publish")
    name = words.parse_name(options["name"])
    return {
        "name": name,
        "rootfs": words.parse_rootfs(options["rootfs"]),
        "env": words.parse_env(options["env"], options["env_file"], os.environ),
        "cwd": options["workdir"],
        "user": options["user"],
        "hostname": options["hostname"],
        "volumes": tuple(words.parse_volume(text) for text in options["volume"]),
        "tmpfs": tuple(words.parse_tmpfs(text) for text in options["tmpfs"]),
        "ports": tuple(words.parse_port(text) for text in options["publish"]),
        "read_only": options["read_only"],
        "cap_add": tuple(options["cap_add"]),
        "cap_drop": tuple(options["cap_drop"]),
        "limits": words.parse_limits(options["memory"], options["cpus"], options["pids_limit"]),
        "restart": restart,
        "userns": options["userns"],
        "seccomp": words.parse_security(options["security_opt"]),
        "init": not options["no_init"],
        "auto_remove": options["auto_remove"],
        "labels": tuple(words.parse_label(text) for text in options["label"]),
        "ip": options["ip"],
        "ip6": options["ip6"],
        "network": options["network"] != "none",
        "network_name": "" if options["network"] in ("bridge", "none") else options["network"],
    }


@click.command("run", context_settings=PASS_ON)
@with_options
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run_command(command: tuple[str, ...], detach: bool, **options: Any) -> int:
    """Create a container and start it.

    Without -d its output is shown until it ends, and its exit code is ours; Ctrl-C stops it. 125 is a failure of
    cmigrate, 126 a COMMAND that can not be executed, 127 one that is not there.
    """
    from migrate.cli.output import open_host

    fields = spec_fields(options)
    with our_failures_are_125(unless=detach):
        from runtime.container import Containers
        from runtime.specify import new_spec

        containers = Containers(open_host())
        spec = new_spec(containers, argv=command, **fields)
        if detach:
            click.echo(containers.run(spec).id)
            return 0
        with ExitStack() as ending:
            if spec.auto_remove:  # also where nobody reads its output any more
                ending.callback(until_removed, containers, spec.id)
            container = containers.run(spec, before_start=lambda new: ending.enter_context(containers.attached(new)))
            return attend(containers, container)


def until_removed(containers: Containers, container_id: str) -> None:
    """Until what --rm promises has been done, so that the name is free; it is not waited for long."""
    from runtime.api import Status
    from runtime.errors import NotFound

    deadline = time.monotonic() + REMOVED_WAIT_S
    with suppress(NotFound):
        while containers.get(container_id).state.status is Status.EXITED and time.monotonic() < deadline:
            time.sleep(REMOVED_POLL_S)


@contextmanager
def our_failures_are_125(*, unless: bool = False) -> Iterator[None]:
    """Errors end with 125, or with 126 and 127 where they say so: the lower numbers are the program's."""
    from migrate.cli.output import fail

    try:
        yield
    except (click.UsageError, click.exceptions.Exit):
        raise
    except BrokenPipeError:
        # Whoever read the output has enough (head): it ends as a program in a pipeline does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(EXIT_SIGPIPE) from None
    except Exception as error:
        if unless:
            raise
        raise SystemExit(max(EXIT_CMIGRATE, fail(error, as_json=False))) from None


def attend(containers: Containers, container: Container) -> int:
    """Show the container's output until it ends; its exit code. The first Ctrl-C or SIGTERM stops it."""
    ended = _Ended(containers, container.id)
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        # From a thread: the main thread goes on showing what the program says while it ends.
        if not stopping:
            threading.Thread(target=_stop_quietly, args=(containers, container.id), name="stop", daemon=True).start()
        stopping.append(number)
        if len(stopping) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        show_log(containers, container.id, ended)
        return ended.exit_code()
    except BrokenPipeError:
        _stop_quietly(containers, container.id)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Ended(threading.Thread):
    """Waits for a container's end in the background; ``is_alive`` while it may still write."""

    def __init__(self, containers: Containers, container_id: str) -> None:
        super().__init__(name="wait", daemon=True)
        self._containers = containers
        self._container_id = container_id
        self._result: int | Exception = EXIT_CMIGRATE
        self.start()

    def run(self) -> None:
        try:
            self._result = self._containers.wait(self._container_id)
        except Exception as error:
            self._result = error

    def exit_code(self) -> int:
        self.join()
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def _stop_quietly(containers: Containers, container_id: str) -> None:
    from runtime.errors import RuntimeFault

    try:
        containers.stop(container_id)
    except RuntimeFault as error:
        print(f"error: {error}", file=sys.stderr)


def show_log(containers: Containers, container_id: str, ended: threading.Thread) -> None:
    """Copy the log to stdout and stderr while it grows, up to the end of what was written when ``ended`` is over."""
    from runtime.logs import read_log

    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    for line in read_log(containers.log_path(container_id), follow=ended.is_alive):
        stream = streams.get(line.stream, sys.stdout)
        stream.write(line.text + "\n")
        stream.flush()


@click.command("exec", context_settings=PASS_ON)
@click.option("-d", "--detach", is_flag=True, help="Do not wait for it.")
@click.option("-i", "--interactive", is_flag=True, help="Pass stdin on.")
@click.option("-e", "--env", metavar="KEY[=VALUE]", multiple=True, help="Set or pass on a variable.")
@click.option("-w", "--workdir", metavar="DIR", default="", help="Directory to start in.")
@click.option("-u", "--user", metavar="USER[:GROUP]", default="", help="Who the program runs as.")
@click.argument("container")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_command(
    container: str,
    command: tuple[str, ...],
    detach: bool,
    interactive: bool,
    env: tuple[str, ...],
    workdir: str,
    user: str,
) -> int:
    """Run one more command in a running container.

    Its exit code is ours; 125 is a failure of cmigrate, 126 a COMMAND that can not be executed, 127 one that is not
    there. It has no terminal: a program with one could not be moved.
    """
    from migrate.cli.options import parse_env
    from migrate.cli.output import open_host

    argv = command[1:] if command[0] == "--" else command
    if not argv:
        raise click.UsageError("no command given: cmigrate exec CONTAINER -- COMMAND [ARG ...]")
    variables = parse_env(env, (), os.environ)
    with our_failures_are_125(unless=detach):
        from runtime.container import Containers
        from runtime.execute import execute

        return execute(
            Containers(open_host()),
            container,
            argv,
            env=variables,
            cwd=workdir,
            user=user,
            interactive=interactive,
            detach=detach,
        )
