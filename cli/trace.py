"""`graft trace`: decisions as they happen."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from . import completion
from .options import Json
from .output import command, say, warn

if TYPE_CHECKING:
    from graft.commands.trace import Traced

_COLOURS = {"refused": typer.colors.RED, "granted": typer.colors.GREEN}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(trace)


@command
def trace(
    container: Annotated[
        str | None,
        typer.Argument(
            metavar="CONTAINER",
            help="A name or id from `graft ps`, or a cgroup. Default: all.",
            autocompletion=completion.attached,
        ),
    ] = None,
    calls: Annotated[
        list[str] | None,
        typer.Option("--call", help="Only these: bind, connect, listen, send, socket, option, packet."),
    ] = None,
    verdicts: Annotated[
        list[str] | None,
        typer.Option("--verdict", help="Only these: refused, granted, relayed, container, passed."),
    ] = None,
    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint", metavar="NAME", help="Only what has to do with it.", autocompletion=completion.endpoints
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Print every decision as it happens, until it is interrupted. With --json an object a line."""
    from graft.commands.find import find
    from graft.commands.trace import Filter, parse_calls, parse_outcomes, watch
    from graft.state.installation import Installation

    require_root()
    graft = Installation.open(Settings.from_environment())
    number = find(graft, container).id if container else 0
    wanted = Filter(number, parse_calls(calls or ()), parse_outcomes(verdicts or ()), endpoint)
    if endpoint:
        graft.endpoints.find(endpoint)
    try:
        for index, batch in enumerate(watch(graft, wanted)):
            if index == 0:
                warn("graft: watching (Ctrl-C ends it)")
            for one in batch.decisions:
                if as_json:
                    print(json.dumps(one.record), flush=True)
                else:
                    _show(one)
            if batch.has_gap:
                warn("graft: some decisions are missing: to print what came before took too long")
            if batch.lost:
                warn(f"graft: {batch.lost} decisions were lost: more came than could be read")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _show(one: Traced) -> None:
    say(str(one), colour=_COLOURS.get(one.event.outcome.name.lower()))
