"""`graft metrics`: what Graft counts, for Prometheus."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from graft.kernel.credentials import require_root
from graft.model.scrape_address import parse_listen
from graft.model.settings import Settings

from .output import command, warn


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(metrics)


@command
def metrics(
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen",
            metavar="unix:/PATH|ADDR:PORT",
            help="Serve them over HTTP at /metrics, at a unix socket or a loopback address.",
        ),
    ] = None,
    owner: Annotated[
        str | None,
        typer.Option("--owner", metavar="USER[:GROUP]", help="unix: who owns the socket. Default: root."),
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", metavar="OCTAL", help="unix: its mode. Default: 0600.")] = None,
) -> None:
    """Print what Graft counts in Prometheus' text format, or serve it for Prometheus to scrape.

    Without --listen it prints once, for a look or for node_exporter's textfile collector.
    """
    from graft.commands import metrics as texts
    from graft.commands import metrics_server, sample
    from graft.errors import UsageError

    if listen is None and (owner is not None or mode is not None):
        raise UsageError("--owner and --mode are of the socket to listen at", "--listen unix:/PATH")
    place = None if listen is None else parse_listen(listen, owner, mode)
    require_root()
    settings = Settings.from_environment()
    if place is None:
        sys.stdout.write(texts.text(sample.take(settings)).decode())
        return
    metrics_server.serve(settings, place, lambda: warn(f"graft: metrics are served at {listen}"))
