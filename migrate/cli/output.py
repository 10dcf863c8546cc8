"""What commands print: JSON lines, tables, errors; and how they get at this host's settings."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from migrate.interrupts import Interrupts

if TYPE_CHECKING:
    from migrate.errors import ErrorText
    from runtime.host import HostConfig

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")

TRACEBACK_VARIABLE = "CMIGRATE_TRACEBACK"
"""Set to 1 to see where an error comes from."""


def open_host() -> HostConfig:
    """This host's settings. Raises NotRoot: what follows touches namespaces, cgroups and root's files."""
    from migrate.errors import NotRoot
    from runtime.host import load_host_config

    if os.geteuid() != 0:
        raise NotRoot("this needs root", hint=f"sudo cmigrate {' '.join(sys.argv[1:2])} …")
    return load_host_config()


def json_line(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value, separators=(",", ":")))


def note(text: str) -> None:
    """For people, on stderr."""
    click.echo(text, err=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, three blanks between them, as docker has it."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        click.echo("   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def fail(error: BaseException, *, as_json: bool, interrupted: bool = False) -> int:
    """Tell an error; the exit code to end with. Of a program that was ``interrupted`` an error that nobody foresaw is
    that."""
    told = _describe(error)
    if interrupted and told.code == "internal-error":
        told = _describe(KeyboardInterrupt())
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        traceback.print_exception(error)
    elif told.code == "internal-error" and isinstance(error, Exception) and not hasattr(error, "what"):
        # Nobody foresaw this one, so the place is all there is to go by.
        note("".join(traceback.format_exception(error)).rstrip())
    try:
        if as_json:
            json_line(told.to_json())
        else:
            note("\n".join(error_lines(told)))
    except OSError:
        pass  # nobody listens; the exit code says it all the same
    return told.exit_code


def error_lines(told: ErrorText) -> list[str]:
    """``error:``, what CRIU said, every blocker with its remedy, ``hint:``."""
    lines = [f"error: {told.what}"]
    lines += [f"    {line}" for line in told.log_lines]
    for blocker in told.blockers:
        lines.append(f"  - {blocker.get('what', '')}")
        if blocker.get("remedy"):
            lines.append(f"    {blocker['remedy']}")
    if told.hint:
        lines.append(f"hint: {told.hint}")
    return lines


def _describe(error: BaseException) -> ErrorText:
    from migrate.errors import ErrorText, ExitCode, NotRoot, describe

    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "cmigrate"
        return ErrorText(
            code="usage", exit_code=ExitCode.USAGE, what=error.format_message(), hint=f"see {where} --help"
        )
    if isinstance(error, click.Abort):
        return describe(KeyboardInterrupt())
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        return describe(NotRoot(f"this needs root ({error.filename or error.strerror})", hint="use sudo"))
    return describe(error)


def for_each(references: Sequence[str], act: Callable[[str], str | None], *, as_json: bool = False) -> None:
    """``act`` on every reference; what it returns is printed. One that fails does not stop the others.

    Exits with the code of the first failure.
    """
    first = 0
    for reference in references:
        try:
            text = act(reference)
        except Exception as error:
            code = fail(error, as_json=as_json)
            first = first or code
            continue
        if text is not None:
            click.echo(text)
    if first:
        raise SystemExit(first)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP are undone as Ctrl-C is: a service manager or a closed terminal must not leave half a move."""

    interrupt = Interrupts().handle
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ago(at: str, now: float) -> str:
    """ "5 minutes" since an RFC 3339 time; "" for none."""
    import datetime

    if not at:
        return ""
    seconds = max(0.0, now - datetime.datetime.fromisoformat(at).timestamp())
    for size, name in ((86400 * 7, "week"), (86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * size or (size == 60 and seconds >= 60):
            count = int(seconds // size)
            return f"{count} {name}" + ("s" if count > 1 else "")
    count = int(seconds)
    return f"{count} second" + ("" if count == 1 else "s")


def human_bytes(count: float | None) -> str:
    """ "12.3MiB", as docker stats has it."""
    if count is None:
        return "--"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f}{unit}" if unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}TiB"
