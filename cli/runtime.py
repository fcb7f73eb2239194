"""`graft runtime`, `graft seccomp-profile`, `graft listen`: for containers that an engine starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from . import completion
from .output import command, say

if TYPE_CHECKING:
    from graft.oci.engine_install import Done

Listener = Annotated[
    Path | None, typer.Option("--listener", help="The socket of `graft listen`. Default: GRAFT_RUN_DIR/listener.")
]


Engine = Annotated[
    str,
    typer.Argument(
        metavar="docker|podman|containerd", help="The engine.", show_default=False, autocompletion=completion.engines
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Its configuration, if at another place than /etc/docker/daemon.json,"
        " /etc/containers/containers.conf.d/graft.conf, /etc/containerd/config.toml.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what would change.")]
_PASSED_ON = "command-of-the-runtime"


class _RuntimeGroup(TyperGroup):
    """`install` and `uninstall`. Any other command is the real runtime's, and so are all words after it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_PASSED_ON, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_RuntimeGroup, no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("seccomp-profile")(seccomp_profile)
    app.command()(listen)


@app.command(
    _PASSED_ON,
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def runtime(context: typer.Context) -> None:
    """Run the OCI runtime (runc or crun) with Graft's policies."""
    from graft.oci import main

    main.main(context.args)


@app.command()
@command
def install(
    engine: Engine,
    config: Config = None,
    program: Annotated[
        Path | None,
        typer.Option("--program", metavar="PATH", help="Which graft-runtime. Default: the one beside this command."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Give an engine the runtime: then `--runtime graft` works. What else its configuration says stays.

    The engine checks the configuration, and if it refuses it, all is put back as it was.
    """
    from graft.oci import engine_install

    if not dry_run:
        require_root()
    done = engine_install.install(engine, config, program or engine_install.own_program(), dry_run)
    _say_change(done, dry_run, "has the runtime graft", "has the runtime graft already")


@app.command()
@command
def uninstall(engine: Engine, config: Config = None, dry_run: DryRun = False) -> None:
    """Take from an engine's configuration what `install` wrote there."""
    from graft.oci import engine_install

    if not dry_run:
        require_root()
    done = engine_install.uninstall(engine, config, dry_run)
    _say_change(done, dry_run, "no longer has the runtime graft", "has nothing that Graft wrote")


def _say_change(done: Done, dry_run: bool, changed: str, unchanged: str) -> None:
    if not done.change.is_needed:
        say(f"{done.change.path}: {unchanged}")
        return
    if dry_run:
        say(*done.change.diff())
        return
    how = f"checked by {done.checked_by}" if done.checked_by else f"not checked: {done.unchecked}"
    say(f"{done.change.path}: {changed} ({how})", done.reload)


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
