"""`graft export`, `graft import`: what is saved, as YAML. `graft watch`: attaches saved containers when they appear."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from .output import command, say, warn


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("export")(export)
    app.command("import")(import_)
    app.command()(watch)


@command
def export(
    file: Annotated[Path | None, typer.Argument(help="The file to write. Default: standard output.")] = None,
) -> None:
    """Print what is saved, or write it to FILE: endpoints, and containers with their policies, as YAML."""
    from graft.commands.transfer import export_to, exported

    require_root()
    text, bad = exported(Settings.from_environment())
    warn(*(f"graft: {line}" for line in bad))
    if file is None:
        typer.echo(text, nl=False)
    else:
        export_to(file, text)
    if bad:
        raise typer.Exit(8)


@command
def import_(
    file: Annotated[Path, typer.Argument(help="A file of `graft export`.", metavar="FILE")],
    check: Annotated[bool, typer.Option("--check", help="Only check FILE.")] = False,
) -> None:
    """Put what FILE has in the place of all that is saved and in force: all of it, or nothing."""
    from graft.commands.cut_off import cut_off
    from graft.commands.policy_apply import check_served
    from graft.commands.transfer import import_state, read_export
    from graft.state.installation import Installation

    require_root()
    state = read_export(file)
    if check:
        say(f"{file}: ok ({len(state.endpoints)} endpoints, {len(state.attachments)} containers)")
        return
    settings = Settings.from_environment()
    done = import_state(settings, state)
    say(*done.lines())
    warn(*cut_off(Installation(settings), {one.name for one in state.endpoints}))
    done.check_in_force()
    check_served(done.unserved)


@command
def watch() -> None:
    """Attach saved containers when they appear, in the foreground.

    `graft up` and `graft attach` start this in the background if it does not run.
    """
    from graft.commands import watcher

    watcher.run(Settings.from_environment())
