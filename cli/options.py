"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import completion

Ingress = Annotated[
    list[str] | None,
    typer.Option(
        "-i",
        metavar="ADDR:PORT[-PORT]=EP",
        help="Map binds of ADDR:PORT (or unix:/PATH) to EP.",
        autocompletion=completion.rule_endpoints,
    ),
]
Egress = Annotated[
    list[str] | None,
    typer.Option(
        "-e",
        metavar="PREFIX=EP",
        help="Reach PREFIX through the host's stack, from endpoint EP.",
        autocompletion=completion.rule_endpoints,
    ),
]
Deny = Annotated[
    bool, typer.Option("--deny", help="With -i and -e: refuse all else, instead of leaving it in the container.")
]
PolicyFile = Annotated[
    Path | None,
    typer.Option("--policy", help="A policy file, instead of -i and -e.", autocompletion=completion.policy_files),
]
NoSave = Annotated[
    bool,
    typer.Option("--no-save", envvar="GRAFT_NO_SAVE", help="Only until the next `graft up` of a new boot."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
