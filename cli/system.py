"""`graft up`, `graft down`, `graft ps`: the data plane as a whole."""

from __future__ import annotations

from typing import Annotated

import typer

from graft import lifecycle
from graft.settings import Settings

from .output import command, listing


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(up)
    app.command()(down)
    app.command()(ps)


@command
def up() -> None:
    """Load the BPF programs and pin them. Every other command does so first."""
    lifecycle.up(Settings.from_environment())


@command
def down(
    force: Annotated[bool, typer.Option("--force", help="End the programs that still run under Graft.")] = False,
) -> None:
    """Remove every pin, attachment and cgroup of Graft's."""
    lifecycle.down(Settings.from_environment(), force)


@command
def ps(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the containers under Graft."""
    from graft import containers

    lifecycle.require_root()
    settings = Settings.from_environment()
    records = [
        {
            "id": container.id,
            "name": container.name,
            "cgroup": container.cgroup,
            "transport": container.transport,
            "netns": container.netns,
            "endpoints": list(container.endpoints),
        }
        for container in containers.listing(settings)
    ]
    rows = [(r["id"], r["name"], r["transport"], ",".join(r["endpoints"]), r["cgroup"]) for r in records]  # type: ignore[arg-type]
    listing(("ID", "NAME", "TRANSPORT", "ENDPOINTS", "CGROUP"), rows, records, as_json)
