"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Ingress = Annotated[
    list[str] | None,
    typer.Option("-i", metavar="ADDR:PORT[-PORT]=EP", help="Map binds of ADDR:PORT (or unix:/PATH) to EP."),
]
Egress = Annotated[
    list[str] | None,
    typer.Option("-e", metavar="PREFIX=EP", help="Reach PREFIX through the host's stack, from endpoint EP."),
]
Deny = Annotated[
    bool, typer.Option("--deny", help="With -i and -e: refuse all else, instead of leaving it in the container.")
]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="A policy file, instead of -i and -e.")]
NoSave = Annotated[
    bool,
    typer.Option("--no-save", envvar="GRAFT_NO_SAVE", help="Only until the next `graft up` of a new boot."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
