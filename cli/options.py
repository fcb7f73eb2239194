"""Options that several commands have, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Ingress = Annotated[
    list[str] | None, typer.Option("-i", metavar="ADDR:PORT[-PORT]=EP", help="A bind that becomes an endpoint.")
]
Egress = Annotated[
    list[str] | None, typer.Option("-e", metavar="PREFIX=EP", help="Destinations reached from an endpoint.")
]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="A policy instead of -i and -e.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]
