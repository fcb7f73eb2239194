"""`graft daemon`: runs graftd, the daemon of transport splice."""

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
    """Run graftd, which relays for attached containers (transport splice), in the foreground.

    `graft attach` starts one in the background if none is running.
    """
    from graft.splice import native

    require_root()
    native.use()
    from graft.splice import daemon as graftd

    graftd.run(Settings.from_environment())
