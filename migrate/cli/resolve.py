"""`cmigrate resolve`, `cmigrate cancel` and `cmigrate undo`."""

from __future__ import annotations

import click

from migrate.cli.output import json_line, json_option, open_host


@click.command("resolve")
@click.argument("container")
@click.option("--keep", type=click.Choice(["source", "target"]), help="Decide a doubt: where it is to run.")
@click.option(
    "--other-side-is-fenced", is_flag=True, help="The other host is off, or its copy was seen to be gone: your word."
)
@json_option
def resolve_command(container: str, keep: str | None, other_side_is_fenced: bool, as_json: bool) -> int:
    """Settle a move that broke off, or decide it.

    CONTAINER is its name or id, or the id of the move. Without --keep the journals and the other host decide; exit code
    6 when they can not. With --keep you do: if the other host can still run it, two copies run.
    """
    host = open_host()
    from migrate.errors import ExitCode
    from migrate.resolve import decide, settle

    open_moves: list[str] = []
    if keep is None:
        settled = settle(host, container)
        told, open_moves = list(settled.told), list(settled.open_moves)
    else:
        told = decide(host, container, keep, other_side_is_fenced=other_side_is_fenced)  # type: ignore[arg-type]
    if as_json:
        json_line({"type": "resolved", "told": told, "open": open_moves})
    elif told or not open_moves:
        click.echo("\n".join(told) or f"nothing is open for {container}")
    return int(ExitCode.IN_DOUBT) if open_moves else 0


@click.command("cancel")
@click.argument("container")
def cancel_command(container: str) -> int:
    """Call off a move that is under way.

    From the host it started on. Exit code 0: it runs on here. 4: no move is under way, or it was too late and the
    container runs on the target.
    """
    host = open_host()
    from migrate.resolve import cancel

    click.echo(cancel(host, container))
    return 0


@click.command("undo")
@click.argument("container")
@click.option("--forget", is_flag=True, help="Give the copy up instead: the container stays where it is.")
def undo_command(container: str, forget: bool) -> int:
    """Take back a container that was moved with --undo-window.

    On the host it was moved from, while the window is open. It runs on there as it was when it was frozen for the move:
    what it has done since then, in memory and in its files, is lost, and its connections to the outside end. The copy
    on the other host is killed first; exit code 6 when that host was asked and does not answer.
    """
    host = open_host()
    from migrate.undo import undo

    click.echo(undo(host, container, forget=forget))
    return 0
