"""`graft daemon`: runs graftd, the daemon of transport splice."""

from __future__ import annotations

import os

import typer

from graft.keeper import protocol
from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from .output import command


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(daemon)


@command
def daemon() -> None:
    """Run graftd, which relays for attached containers (transport splice), in the foreground.

    `graft attach` starts one in the background if none is running. It is started again when it dies, without losing
    connections: by a small process in the place of this one, or by the service manager that started this one.
    """
    from graft.splice import daemon as graftd
    from graft.splice import daemon_process

    require_root()
    settings = Settings.from_environment()
    if protocol.NOTIFY_SOCKET in os.environ:
        graftd.run(settings)
    else:
        daemon_process.become_keeper(settings)
