"""`graft attach`, `graft detach`: containers that run already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.errors import UnfinishedError, UsageError
from graft.kernel.credentials import require_root
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.state.installation import Installation

from .options import Egress, Ingress, PolicyFile
from .output import command, say

if TYPE_CHECKING:
    from graft.commands.attach import Attached
    from graft.commands.detach import Detached

Which = Annotated[
    str,
    typer.Option(
        "--cgroup",
        metavar="CONTAINER",
        help="A cgroup v2 path, a container of docker or podman, or a systemd unit; docker:X and the like choose.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(attach)
    app.command()(detach)


@command
def attach(
    which: Which,
    policy: PolicyFile = None,
    ingress: Ingress = None,
    egress: Egress = None,
    transport: Annotated[str, typer.Option("--transport", help="auto, direct, swap or splice.")] = "auto",
    relay: Annotated[
        str | None,
        typer.Option("--relay", help="How transport splice moves bytes: splice, or kernel.", show_default="splice"),
    ] = None,
) -> None:
    """Put a running container under a policy, or replace the policy that it has."""
    from graft.commands.attach import attach as attach_container
    from graft.commands.policy_source import policy_of
    from graft.splice import client as splice

    wanted = None if transport == "auto" else Transport.parse(transport, "--transport")
    if relay not in (None, *splice.RELAYS):
        raise UsageError(f"--relay: {relay!r} is no relay", "splice or kernel")
    require_root()
    settings = Settings.from_environment()
    rules = policy_of(settings, which.rstrip("/").rpartition("/")[2], policy, ingress or [], egress or [])
    done = attach_container(Installation.open(settings), which, rules, wanted, relay)
    say(*_found(done))
    if done.choice.transport is Transport.SPLICE:
        say(*_relayed(splice.describe(settings, done.container)))


def _found(done: Attached) -> list[str]:
    target, choice = done.target, done.choice
    lines = [f"{done.container.name}: {target.engine}, {target.cgroup}"]
    for inode, count in sorted(done.observed.namespaces.items()):
        whose = "the host's network namespace" if inode == done.observed.host else "a network namespace of its own,"
        lines.append(f"  {count} process{'' if count == 1 else 'es'} in {whose} net:[{inode}]")
    if not done.observed.namespaces:
        lines.append("  no process yet")
    lines.append(f"  transport {choice.transport}: {choice.why}")
    if choice.why_not_better:
        lines.append(f"  no better one: {choice.why_not_better}")
    if done.observed.outside and choice.transport is Transport.DIRECT:
        lines.append(f"  {done.observed.outside} of them are in namespaces of their own, where nothing is granted")
    lines.append(f"  policy {done.container.policy}" + (": in the place of the old one" if done.replaced else ""))
    lines += [
        f"  {field} has no effect: it is for UDP, and transport {choice.transport} carries TCP"
        for field in done.without_effect
    ]
    if done.existing is None:
        lines.append("  the kernel does not answer which sockets it had before: they may hear nobody any more")
    elif done.existing:
        lines.append("  sockets that were there before; their addresses and connections stay as they are:")
        lines += [f"    {held}" for held in done.existing]
    return lines


def _relayed(about: dict[str, Any]) -> list[str]:
    lines = [f"  relay {about['relay']}, by graftd ({about['pid']})"]
    lines += [f"  {one['address']} leads to its listener {one['listener']}" for one in about["published"]]
    lines += [f"  its listener {one['listener']} has no endpoint: {one['error']}" for one in about["failed"]]
    lines += [f"  its listener {one} is named by no rule" for one in about["not_granted"]]
    if about["more_not_granted"]:
        lines.append(f"  and {about['more_not_granted']} others")
    if about["too_many"]:
        lines.append(f"  {about['too_many']} of these are named by a rule, but are too many for one container")
    if not about["published"] and not about["failed"]:
        lines.append("  nothing that a rule names is listened on yet: an endpoint refuses until it is")
    return lines


@command
def detach(
    which: Which,
    keep: Annotated[
        bool, typer.Option("--keep-connections", help="Let connections through endpoints go on to their end.")
    ] = False,
) -> None:
    """Take a container's policy away. What it was granted ends with it."""
    from graft.commands.detach import detach as detach_container

    require_root()
    done = detach_container(Installation.open(Settings.from_environment()), which, keep)
    say(*_left(done))
    _complain(done)


def _left(done: Detached) -> list[str]:
    sockets, lines = done.sockets, [f"{done.container.name}: detached"]
    for heading, found in (
        ("ended, because an endpoint was what let them be", sockets.ended),
        ("not ended, though an endpoint was what let them be", sockets.unended),
        ("still open on the host's stack", sockets.left),
    ):
        if found:
            lines.append(f"  {heading}:")
            lines += [f"    {held}" for held in found]
    return lines


def _complain(done: Detached) -> None:
    """Raises UnfinishedError where something that should end has not."""
    sockets = done.sockets
    if not sockets.known:
        raise UnfinishedError(
            f"the kernel does not answer which sockets {done.container.name} has: some may not have ended",
            "end the container to be sure",
        )
    if sockets.unended:
        count = len(sockets.unended)
        later = f"process {sockets.helper} goes on trying; " if sockets.helper else ""
        raise UnfinishedError(
            f"{count} socket{'' if count == 1 else 's'} of {done.container.name} could not be ended",
            f"{later}end the container to be sure",
        )
