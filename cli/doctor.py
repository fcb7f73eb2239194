"""`graft doctor`: which kernel features this machine has."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from graft.kernel.credentials import require_root

from .options import Json
from .output import command, listing, say, warn


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(doctor)


Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Print the verifier's log of each program that is not accepted.")
]


@command
def doctor(verbose: Verbose = False, as_json: Json = False) -> None:
    """List kernel features and BPF programs, what each is for, and whether this machine has it.

    The exit status is 6 if a necessary one is missing.
    """
    from graft.commands.doctor import features, kernel

    require_root()
    found = features()
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
    if any(one.needed and not one.present for one in found):
        raise SystemExit(6)
