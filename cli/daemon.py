"""`graft daemon`: runs graftd, the daemon of transport splice."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from graft.keeper import protocol
from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from .output import command, say


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(daemon)


@command
def daemon(
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace the daemon that runs by this version."),
    ] = False,
) -> None:
    """Run graftd, which relays for attached containers (transport splice), in the foreground.

    `graft attach` starts one in the background if none is running. It is started again when it dies, without losing
    connections: by a small process in the place of this one, or by the service manager that started this one. With
    --replace that is done on purpose, for an upgrade.
    """
    from graft.splice import daemon_process, native

    require_root()
    settings = Settings.from_environment()
    if replace:
        replaced = daemon_process.replace(settings)
        say(f"graftd {replaced}" if replaced else "graftd is replaced by the service manager")
        return
    if protocol.NOTIFY_SOCKET not in os.environ:
        daemon_process.become_keeper(settings)
    if protocol.inherited_folder(os.environ) is None:  # the service manager's, and no child of Graft's own keeper
        daemon_process.take_over(settings)
    native.use()
    from graft.splice import daemon as graftd

    graftd.run(settings)
