"""`graft doctor`: which kernel features this machine has, and what is wrong with this installation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from .options import Json
from .output import command, listing, say, warn


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(doctor)


Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Print the verifier's log of each program that is not accepted.")
]


Fix = Annotated[bool, typer.Option("--fix", help="Mend what can be mended in this installation, first.")]


@command
def doctor(verbose: Verbose = False, fix: Fix = False, as_json: Json = False) -> None:
    """List kernel features and BPF programs, what each is for, and whether this machine has it; and what is wrong with
    this installation, with the command that mends it.

    The exit status is 6 if a necessary feature is missing, 1 if something is wrong.
    """
    from graft.commands import health
    from graft.commands.doctor import features, kernel

    require_root()
    settings = Settings.from_environment()
    wrong = health.mend(settings, lambda line: warn(f"graft: {line}")) if fix else health.ailments(settings)
    found = features(settings)
    rows = [
        ("yes" if one.present else "MISSING" if one.needed else "no", one.name, one.purpose, one.without)
        for one in found
    ]
    if not as_json:
        warn(f"kernel {kernel()}")
    listing(("HAVE", "FEATURE", "WHAT FOR", "WITHOUT IT"), rows, [asdict(one) for one in found], as_json)
    for one in found:
        if verbose and one.log and not as_json:
            say("", f"{one.name}:", *one.log.splitlines())
    for one in found:
        if one.command and not one.present:
            warn(f"graft: {one.name} is missing: {one.command}")
    for ailment in wrong:
        by_itself = "graft doctor --fix, or " if ailment.mend is not None and not fix else ""
        warn(f"graft: {ailment.name}: {ailment.problem} ({by_itself}{ailment.command})")
    if any(one.needed and not one.present for one in found):
        raise SystemExit(6)
    if wrong:
        raise SystemExit(1)
