"""`graft ep`: adds, changes, deletes and lists endpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from graft.kernel.credentials import require_root
from graft.model.endpoint import Endpoint, parse_endpoint
from graft.model.settings import Settings
from graft.state.installation import Installation

from . import completion
from .options import Json, NoSave
from .output import command, listing, warn

app = typer.Typer(no_args_is_help=True)

Name = Annotated[
    str,
    typer.Argument(
        help="The endpoint's name, up to 31 bytes.",
        show_default=False,
        autocompletion=completion.endpoints_to_change,
    ),
]
Spec = Annotated[
    str,
    typer.Argument(
        metavar="ADDR:PORT[-PORT]|unix:/PATH",
        help="IPv4 or [IPv6], a port, a range of ports (20000-20100) or dynamic; a unix socket.",
        show_default=False,
    ),
]
Proto = Annotated[str, typer.Option("--proto", help="The protocol: tcp, udp or any.")]
Netns = Annotated[
    str | None, typer.Option("--netns", help="Its network namespace: a name, a pid or a path. Default: the host's.")
]
Open = Annotated[bool, typer.Option("--open", help="Let containers ask for it in their environment.")]
Multicast = Annotated[
    list[str] | None,
    typer.Option("--multicast", help="A multicast group that its sockets may join, such as 239.1.1.1. Repeatable."),
]
DualStack = Annotated[bool, typer.Option("--dual-stack", help="At [::]: serve IPv4 clients too, not only IPv6.")]

Owner = Annotated[
    str | None, typer.Option("--owner", metavar="USER[:GROUP]", help="unix: who owns the socket that Graft makes.")
]
Mode = Annotated[str | None, typer.Option("--mode", metavar="OCTAL", help="unix: its mode. Default: 0660.")]


def _installation() -> Installation:
    require_root()
    return Installation.open(Settings.from_environment())


def _add(graft: Installation, endpoint: Endpoint, save: bool) -> str | None:
    from graft.commands import endpoints  # imports yaml

    return endpoints.add(graft, endpoint, save)


def _set(graft: Installation, endpoint: Endpoint, save: bool) -> str | None:
    from graft.commands import endpoints
    from graft.commands.cut_off import cut_off

    obstacle = endpoints.change(graft, endpoint, save)
    warn(*cut_off(graft, {endpoint.name}))
    return obstacle


def _register(verb: str, summary: str, write: Callable[[Installation, Endpoint, bool], str | None]) -> None:
    """`graft ep add` and `graft ep set`: the same options, another function of graft/commands/endpoints.py."""

    @app.command(verb, help=summary)
    @command
    def write_endpoint(
        name: Name,
        spec: Spec,
        proto: Proto = "any",
        netns: Netns = None,
        open_: Open = False,
        dual_stack: DualStack = False,
        multicast: Multicast = None,
        owner: Owner = None,
        mode: Mode = None,
        no_save: NoSave = False,
    ) -> None:
        endpoint = parse_endpoint(name, spec, proto, netns, open_, dual_stack, multicast or (), owner, mode)
        with _installation() as graft:
            obstacle = write(graft, endpoint, not no_save)
        if obstacle:
            warn(f"graft: {name} is not saved for the next boot: {obstacle}")


_register("add", "Add an endpoint.", _add)
_register("set", "Change an endpoint, from the next bind or connect on.", _set)


@app.command("del")
@command
def del_(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Delete it even if a container uses it.")] = False,
    no_save: NoSave = False,
) -> None:
    """Delete an endpoint."""
    from graft.commands import endpoints

    with _installation() as graft:
        endpoints.delete(graft, name, force, not no_save)


@app.command()
@command
def show(
    name: Annotated[str | None, typer.Argument(help="This endpoint only.", autocompletion=completion.endpoints)] = None,
    as_json: Json = False,
) -> None:
    """List the endpoints, or one of them."""
    require_root()
    with Installation.open(Settings.from_environment()) as graft:
        found = [graft.endpoints.find(name)] if name else graft.endpoints.listing()
    records = [
        {
            "name": stored.endpoint.name,
            "address": stored.endpoint.spec,
            "ports": stored.endpoint.port_count,
            "family": f"ipv{stored.endpoint.family}" if stored.endpoint.unix is None else "unix",
            "protocol": stored.endpoint.protocols.label,
            "netns": stored.endpoint.netns,
            "open": stored.endpoint.open,
            "dual_stack": stored.endpoint.dual_stack,
            "multicast": [str(group) for group in stored.endpoint.multicast],
            "declared": stored.declared,
            **_file_of(stored.endpoint),
        }
        for stored in found
    ]
    rows = [
        (r["name"], r["address"], r["protocol"], r["netns"] or "host", "open" if r["open"] else "-") for r in records
    ]
    listing(("NAME", "ADDRESS", "PROTO", "NETNS", "OPEN"), rows, records, as_json)


def _file_of(endpoint: Endpoint) -> dict[str, str | None]:
    """What only the endpoint of a unix socket has."""
    unix = endpoint.unix
    return {} if unix is None else {"owner": unix.owner, "mode": f"{unix.mode:04o}"}
