"""`graft up`, `graft down`: the data plane as a whole."""

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
    """Load the BPF programs and pin them. Every other command does so first."""
    dataplane.up(Settings.from_environment())


@command
def down(
    force: Annotated[bool, typer.Option("--force", help="End the programs that still run under Graft.")] = False,
) -> None:
    """Remove every pin, attachment and cgroup of Graft's."""
    from graft.commands.down import down as take_down

    take_down(Settings.from_environment(), force)
