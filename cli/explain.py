"""`graft explain`: what would happen with an address."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from . import completion
from .options import Json
from .output import command, say


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(explain)


@command
def explain(
    container: Annotated[
        str,
        typer.Argument(
            metavar="CONTAINER", help="A name or id from `graft ps`, or a cgroup.", autocompletion=completion.attached
        ),
    ],
    call: Annotated[str, typer.Argument(metavar="bind|connect", help="The call.")],
    address: Annotated[str, typer.Argument(metavar="ADDR:PORT", help="What a program would ask for.")],
    proto: Annotated[str, typer.Option("--proto", help="tcp, udp, or icmp (only connect).")] = "tcp",
    as_json: Json = False,
) -> None:
    """Print which rule decides about ADDR:PORT, and what would happen, by the kernel's own lookup."""
    from graft.commands.explain import explain as explain_address
    from graft.commands.explain import parse_protocol
    from graft.commands.find import find
    from graft.model.address import parse_socket_address
    from graft.state.installation import Installation

    require_root()
    wanted, protocol = parse_socket_address(address), parse_protocol(proto)
    graft = Installation.open(Settings.from_environment())
    found = explain_address(graft, find(graft, container), call, wanted, protocol)
    if as_json:
        print(json.dumps(found.record, indent=2))
    else:
        say(*found.lines())
