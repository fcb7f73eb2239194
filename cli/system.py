"""`graft up`, `graft down`: loads and removes the BPF programs."""

from __future__ import annotations

from typing import Annotated

import typer

from graft.model.settings import Settings

from .output import command, warn


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(up)
    app.command()(down)


@command
def up() -> None:
    """Load and pin the BPF programs, and restore what is saved. Other commands do it when necessary."""
    from graft.commands.up import bring_up, lines_of

    warn(*(f"graft: {line}" for line in lines_of(bring_up(Settings.from_environment()))))


@command
def down(
    force: Annotated[
        bool,
        typer.Option("--force", help="Also while containers run: kill those of transport swap, detach the others."),
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Also what is saved, which the next `graft up` would restore.")
    ] = False,
) -> None:
    """Remove every pin, attachment, cgroup and file of Graft. What is saved stays, unless --forget."""
    from graft.commands.down import down as take_down

    take_down(Settings.from_environment(), force, forget)
