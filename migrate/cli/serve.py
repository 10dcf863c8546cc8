"""`cmigrate serve`: the agent."""

from __future__ import annotations

import click


@click.command("serve")
@click.option("--listen", metavar="ADDRESS", help="Address to listen on (default: stream_listen of config.toml).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on (default: stream_port of config.toml).")
@click.option("--stdio", is_flag=True, help="Serve one peer over stdin and stdout; this is what comes in by SSH.")
@click.option("--peer", metavar="NAME", default="", help="With --stdio: who the SSH key says is calling.")
@click.option("--max-sessions", type=click.IntRange(1), metavar="N", help="At most N peers at once (default 32).")
@click.option("--grace", "grace_s", type=click.FloatRange(0), metavar="SECONDS", help="For sessions at the end (10).")
def serve_command(
    listen: str | None, port: int | None, stdio: bool, peer: str, max_sessions: int | None, grace_s: float | None
) -> None:
    """Run this host's agent: answer hosts that were added with `cmigrate host add`.

    Ends at SIGTERM, after its sessions had a short time to undo what they were at. Containers are not touched.
    """
    from migrate.serve import GRACE_S, MAX_SESSIONS, Agent, serve_stdio
    from runtime.host import load_host_config

    host = load_host_config()
    if stdio:
        if listen is not None or port is not None:
            raise click.UsageError("--stdio listens nowhere: leave --listen and --port out")
        if not serve_stdio(host, peer):
            raise SystemExit(1)
        return
    if peer:
        raise click.UsageError("--peer goes with --stdio")
    Agent(
        host,
        listen_on=host.stream_listen if listen is None else listen,
        port=host.stream_port if port is None else port,
        max_sessions=MAX_SESSIONS if max_sessions is None else max_sessions,
        grace_s=GRACE_S if grace_s is None else grace_s,
    ).run()
