"""`graft ps`: the attached containers, and their sockets on the host's stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from graft.kernel.credentials import require_root
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.model.unix_socket import SCHEME

from .options import Json
from .output import command, listing, warn

if TYPE_CHECKING:
    from graft.commands.ps import ContainerOverview, Waiting
    from graft.state.inventory import ContainerSocket


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(ps)


@command
def ps(as_json: Json = False) -> None:
    """List the attached containers, with their sockets on the host's stack."""
    from graft.commands import renew, watcher_process
    from graft.commands.ps import overview, unread, waiting
    from graft.datapath.dataplane import is_up
    from graft.state.installation import Installation

    require_root()
    graft = Installation(Settings.from_environment())
    up = is_up(graft.settings)
    overviews = overview(graft) if up else []
    records = [
        {
            "state": "attached",
            "id": one.container.id,
            "name": one.container.name,
            "engine": one.container.engine,
            "cgroup": one.container.cgroup,
            "transport": str(one.container.transport),
            "netns": one.container.netns,
            "policy": one.container.policy,
            "endpoints": list(one.container.endpoints),
            "processes": one.processes,
            "namespaces": list(one.namespaces),
            "supervisor": one.supervisors[0] if one.supervisors else None,
            "stuck": sorted(one.stuck),
            "relay": None if one.relay is None else dict(one.relay),
            "sockets": None
            if one.sockets is None
            else [
                {
                    "protocol": sock.listed.protocol,
                    "state": sock.listed.state,
                    "local": sock.listed.local,
                    "remote": sock.listed.remote,
                    "endpoint": sock.endpoint,
                    "asked": sock.asked,
                    "pid": sock.pid or None,
                }
                for sock in one.sockets
            ],
            "unsearched": list(one.unsearched),
            "unlisted": list(one.unlisted),
        }
        for one in overviews
    ]
    rows: list[tuple[object, ...]] = [
        (
            one.container.id,
            one.container.name,
            one.container.engine,
            one.container.transport,
            _served_by(one),
            ",".join(one.container.endpoints) or "-",
            _summary(one) + _doubts(one),
            one.container.cgroup,
        )
        for one in overviews
    ]
    waits = waiting(graft)
    records += [_waiting_record(one) for one in waits]
    rows += [
        (
            "-",
            one.saved.target.name,
            one.saved.target.engine,
            "-",
            "-",
            ",".join(one.endpoints) or "-",
            f"waiting: {one.why}",
            one.saved.last.cgroup or "-",
        )
        for one in waits
    ]
    title = ("ID", "NAME", "ENGINE", "TRANSPORT", "SUPERVISOR", "ENDPOINTS", "SOCKETS", "CGROUP")
    listing(title, rows, records, as_json)
    if up and (problem := renew.problem(graft.settings)):
        warn(f"graft: hooks: {problem} (graft up)")
    warn(*(f"graft: not confined: {one.unhooked}" for one in overviews if one.unhooked))
    warn(*(f"graft: not restored: {line}" for line in unread(graft.settings)))
    if waits or watcher_process.is_running(graft.settings):
        warn(*(f"graft: {line}" for line in watcher_process.warnings(graft.settings)))
    warn(*(f"graft: cannot show a container: {error.message}" for error in graft.containers.read_all()[1]))


def _waiting_record(one: Waiting) -> dict[str, Any]:
    """As that of a container, as far as one that is not there has anything; and why it waits."""
    saved = one.saved
    return {
        "state": "waiting",
        "waits": one.why,
        "id": None,
        "name": saved.target.name,
        "engine": saved.target.engine,
        "cgroup": None,
        "last_cgroup": saved.last.cgroup or None,
        "transport": None,
        "netns": None,
        "policy": saved.policy.name,
        "endpoints": list(one.endpoints),
        "processes": 0,
        "namespaces": [],
        "supervisor": None,
        "stuck": [],
        "relay": None,
        "sockets": [],
    }


def _doubts(one: ContainerOverview) -> str:
    """Why the container may have more sockets than these."""
    if one.processes is None:
        return "; somebody holds its cgroup's directory"
    text = f"; {len(one.unsearched)} of its processes could not be searched" if one.unsearched else ""
    return text + "".join(f"; not all {kind} sockets could be listed" for kind in one.unlisted)


def _served_by(one: ContainerOverview) -> str:
    """The container's supervisor, or graftd with its relay; "-" if it has neither."""
    if one.stuck:
        return ", ".join(f"{pid} does not answer" for pid in sorted(one.stuck))
    if one.supervisors:
        return str(one.supervisors[0])
    relay = one.relay
    return f"graftd {relay['pid']}, {relay['relay']}" if relay is not None and relay["serves"] else "-"


def _summary(one: ContainerOverview) -> str:
    """The container's sockets on the host's stack, and what graftd relays for it."""
    if one.relay is None:
        return _socket_summary(one.sockets)
    relayed = _relay_summary(one.relay)
    if one.container.transport is Transport.SPLICE:
        return relayed
    return ", ".join(text for text in (_socket_summary(one.sockets), relayed) if text != "-") or "-"


def _relay_summary(relay: Mapping[str, Any]) -> str:
    """Where graftd listens for a container, and how many connections it relays."""
    if not relay["serves"]:
        return f"not served: {relay.get('problem', 'not yet')}"
    addresses = [one["address"] for one in relay["published"]]
    words = [address if address.startswith(SCHEME) else f"tcp {address}" for address in addresses]
    count = relay["connections"]
    words += [f"not up to date: {relay['problem']}"] if "problem" in relay else []
    words += [f"{count} connection{'' if count == 1 else 's'}"] if count else []
    words += [f"waits for {relay['waits']} s: a call for it took long"] if relay["waits"] else []
    return ", ".join(words) or "-"


def _socket_summary(sockets: Sequence[ContainerSocket] | None) -> str:
    """Where the container listens, and how many connections it has."""
    if sockets is None:
        return "unknown: the kernel does not answer"
    words = [f"{one.listed.protocol} {one.listed.local}" for one in sockets if one.listed.state == "listening"]
    words += [f"{one.listed.protocol} {one.listed.local}" for one in sockets if one.listed.state == "unconnected"]
    connections = sum(one.listed.is_connection for one in sockets)
    if connections:
        words.append(f"{connections} connection{'' if connections == 1 else 's'}")
    return ", ".join(dict.fromkeys(words)) or "-"
