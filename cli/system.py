"""`graft up`, `graft down`: loads and removes the BPF programs."""

from __future__ import annotations

from typing import Annotated

import typer

from graft.datapath import dataplane
from graft.model.settings import Settings

from .output import command


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(up)
    app.command()(down)


@command
def up() -> None:
    """Load and pin the BPF programs. Other commands do it when necessary."""
    dataplane.up(Settings.from_environment())


@command
def down(
    force: Annotated[
        bool,
        typer.Option("--force", help="Also while containers run: kill those of transport swap, detach the others."),
    ] = False,
) -> None:
    """Remove every pin, attachment, cgroup and file of Graft."""
    from graft.commands.down import down as take_down

    take_down(Settings.from_environment(), force)
