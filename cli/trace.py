"""`graft trace`: decisions as they happen."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from graft.errors import UsageError
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
    to_journal: Annotated[
        bool, typer.Option("--journal", help="Write to systemd's journal instead, with a field for each part.")
    ] = False,
) -> None:
    """Print every decision as it happens, until it is interrupted. With --json an object a line."""
    from graft.commands.find import find
    from graft.commands.trace import Filter, parse_calls, parse_outcomes, watch
    from graft.state.installation import Installation

    require_root()
    if as_json and to_journal:
        raise UsageError("--journal: not together with --json", "entries of the journal have fields")
    graft = Installation.open(Settings.from_environment())
    number = find(graft, container).id if container else 0
    wanted = Filter(number, parse_calls(calls or ()), parse_outcomes(verdicts or ()), endpoint)
    if endpoint:
        graft.endpoints.find(endpoint)
    show, complain = _to_journal() if to_journal else (_print_json if as_json else _print, warn)
    try:
        for index, batch in enumerate(watch(graft, wanted)):
            if index == 0:
                warn("graft: watching (Ctrl-C ends it)")
            for one in batch.decisions:
                show(one)
            if batch.has_gap:
                complain("graft: some decisions are missing: to print what came before took too long")
            if batch.lost:
                complain(f"graft: {batch.lost} decisions were lost: more came than could be read")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _print(one: Traced) -> None:
    say(str(one), colour=_COLOURS.get(one.event.outcome.name.lower()))


def _print_json(one: Traced) -> None:
    print(json.dumps(one.record), flush=True)


def _to_journal() -> tuple[Callable[[Traced], None], Callable[[str], None]]:
    """What writes a decision to the journal, and what else there is to say."""
    from graft.commands.trace import journal_fields
    from graft.kernel.journal import Journal, Priority

    journal = Journal("graft-trace")

    def send(text: str, priority: Priority, fields: dict[str, str]) -> None:
        if not journal.send(text, priority, fields):
            warn(text)

    def show(one: Traced) -> None:
        is_refused = one.event.outcome.name == "REFUSED"
        send(one.text, Priority.NOTICE if is_refused else Priority.INFO, journal_fields(one.record))

    return show, lambda text: send(text, Priority.WARNING, {})
