"""`graft daemon`: the process of the splice transport's relays."""

from __future__ import annotations

import typer

from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from .output import command


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(daemon)


@command
def daemon() -> None:
    """Run the relays of containers that ran before Graft, in the foreground. `graft attach` starts one by itself."""
    from graft.splice import daemon as graftd

    require_root()
    graftd.run(Settings.from_environment())
