"""`cmigrate checkpoint` and `cmigrate restore`: a container in one file."""

from __future__ import annotations

from pathlib import Path

import click

from migrate.cli.output import human_bytes, json_line, json_option, open_host, terminated_like_interrupted


@click.command("checkpoint")
@click.argument("container")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option("--leave-running", is_flag=True, help="Let the container run on.")
@json_option
def checkpoint_command(container: str, output: Path, leave_running: bool, as_json: bool) -> None:
    """Write a container to a file.

    Its memory, its part of the root, its log and its settings. Without --leave-running it ends here.
    """
    host = open_host()
    from migrate.checkpoint import checkpoint

    with terminated_like_interrupted():
        written = checkpoint(host, container, output, leave_running=leave_running)
    size = output.stat().st_size
    if as_json:
        json_line(
            {"type": "checkpoint", "id": written.id, "container": written.name, "file": str(output), "bytes": size}
        )
    else:
        click.echo(f"{output} ({human_bytes(size)})")


@click.command("restore")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Another name than it had.")
@json_option
def restore_command(file: Path, name: str | None, as_json: bool) -> None:
    """Bring a container back from a file."""
    from migrate.cli.options import parse_name

    wanted = parse_name(name)
    host = open_host()
    from migrate.checkpoint import restore

    with terminated_like_interrupted():
        container = restore(host, file, name=wanted)
    if as_json:
        json_line({"type": "container", "id": container.id, "name": container.name})
    else:
        click.echo(container.id)
