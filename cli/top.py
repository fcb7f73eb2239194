"""`graft top`: containers, and what they do in a second."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from .output import Frame, command, refreshing

if TYPE_CHECKING:
    from graft.commands.top import ContainerRates, Rates

_TITLE = (
    *("ID", "NAME", "TRANSPORT", "ENDPOINTS", "SOCKETS", "CONN/S", "IN/S", "OUT/S", "REFUSED", "REFUSED/S"),
    *("CALLS/S", "P50", "P99"),
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(top)


@command
def top(
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.1, max=3600, help="Between two samples.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table, after one interval, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, after one interval, and end.")] = False,
) -> None:
    """Show the attached containers with their sockets, connections, relayed bytes and refusals in a second.

    CALLS/S are those that a supervisor was notified of, P50 and P99 how long it took for half and for 99 % of them at
    most; on a terminal a histogram of all containers' is below the table.

    It goes on until it is interrupted: on a terminal in place, in a pipe one table after the other, tab-separated.
    Bytes are those that graftd relays (transport splice); what else a container sends, Graft does not see.
    """
    from graft.commands.top import watch

    from .call_times import bars

    require_root()
    found = watch(Settings.from_environment(), interval)
    if once or as_json:
        found = itertools.islice(found, 1, 2)  # the first has no rates
    if as_json:
        for one in found:
            print(json.dumps(_record(one), indent=2))
        return
    frames = (Frame(_summary(one), [_row(each) for each in one.containers], bars(one.calls)) for one in found)
    refreshing(_TITLE, frames)


def _summary(one: Rates) -> str:
    """The line above the table."""
    if not one.sample.is_up:
        return "Graft is not up"
    words = [_number(len(one.containers), "container"), _number(len(one.sample.endpoints), "endpoint")]
    words.append("graftd runs" if one.sample.graftd_started is not None else "graftd does not run")
    words += [f"not all {kind} sockets could be listed" for kind in one.sample.unlisted]
    return ", ".join(words)


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _row(one: ContainerRates) -> tuple[object, ...]:
    from .call_times import quantile

    return (
        one.container.id,
        one.container.name,
        one.container.transport,
        ",".join(one.container.endpoints) or "-",
        "unknown" if one.sockets is None else one.sockets,
        _rate(one.connection_rate),
        _size(one.bytes_in_rate),
        _size(one.bytes_out_rate),
        one.refusals,
        _rate(one.refusal_rate),
        _rate(one.call_rate),
        quantile(one.calls, 0.5),
        quantile(one.calls, 0.99),
    )


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _size(value: float | None) -> str:
    from rich.filesize import decimal

    return "-" if value is None else decimal(round(value))


def _record(one: Rates) -> dict[str, Any]:
    return {
        "up": one.sample.is_up,
        "seconds": round(one.seconds, 3),
        "endpoints": list(one.sample.endpoints),
        "graftd_started": one.sample.graftd_started,
        "unlisted": list(one.sample.unlisted),
        "containers": [_container_record(container) for container in one.containers],
    }


def _container_record(one: ContainerRates) -> dict[str, Any]:
    from .call_times import record

    return {
        "id": one.container.id,
        "name": one.container.name,
        "transport": str(one.container.transport),
        "endpoints": list(one.container.endpoints),
        "sockets": one.sockets,
        "connections_per_second": one.connection_rate,
        "bytes_in_per_second": one.bytes_in_rate,
        "bytes_out_per_second": one.bytes_out_rate,
        "refusals": one.refusals,
        "refusals_per_second": one.refusal_rate,
        "calls_per_second": one.call_rate,
        "calls": None if one.calls is None else record(one.calls),
    }
