"""`graft runtime`, `graft seccomp-profile`, `graft listen`: for containers that an engine starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from .output import command, say

Listener = Annotated[
    Path | None, typer.Option("--listener", help="The socket of `graft listen`. Default: GRAFT_RUN_DIR/listener.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    unparsed = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
    app.command(context_settings=unparsed, add_help_option=False)(runtime)
    app.command("seccomp-profile")(seccomp_profile)
    app.command()(listen)


def runtime(context: typer.Context) -> None:
    """Run the OCI runtime (runc or crun) with Graft's policies. Engines run this as graft-runtime."""
    from graft.oci import main

    main.main(context.args)


@command
def seccomp_profile(
    base: Annotated[Path | None, typer.Option("--base", help="The profile to start from. Default: podman's.")] = None,
    listener: Listener = None,
    born: Annotated[
        bool,
        typer.Option("--born", help="For policies that leave nothing to the container's own stack: sockets are born."),
    ] = False,
) -> None:
    """Print a seccomp profile for `podman --security-opt seccomp=FILE`, for use with `graft listen`."""
    from graft.oci.listener import default_path
    from graft.oci.profile_text import profile_text, read_base

    path = (listener or default_path(Settings.from_environment())).absolute()
    print(profile_text(read_base(base), path, born))


@command
def listen(listener: Listener = None) -> None:
    """Serve containers that have a profile of `graft seccomp-profile`, in the foreground."""
    from graft.oci import options
    from graft.oci.listener import default_path, serve_listener_socket

    require_root()
    settings = Settings.from_environment()
    path = (listener or default_path(settings)).absolute()
    serve_listener_socket(settings, options.load(os.environ), path, lambda line: say(f"graft: {line}"))
