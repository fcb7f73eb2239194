"""`graft attach`, `graft detach`: containers that are already running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.errors import UnfinishedError, UsageError
from graft.kernel.credentials import require_root
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.state.installation import Installation

from . import completion
from .options import Deny, Egress, Ingress, NoSave, PolicyFile
from .output import command, say, warn

if TYPE_CHECKING:
    from graft.commands.attach import Attached
    from graft.commands.detach import Detached
    from graft.state.inventory import ContainerSocket

Which = Annotated[
    str,
    typer.Option(
        "--cgroup",
        metavar="CONTAINER",
        help="A cgroup v2 path, a docker or podman container, or a systemd unit (docker:X, unit:X, ... if ambiguous).",
        show_default=False,
        autocompletion=completion.containers,
    ),
]


_MOST_UNSEARCHED = 8  # that are named


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
    deny: Deny = False,
    transport: Annotated[
        str, typer.Option("--transport", help="The transport: auto, direct, swap or splice.")
    ] = "auto",
    relay: Annotated[
        str | None,
        typer.Option("--relay", help="How transport splice moves bytes: splice or kernel.", show_default="splice"),
    ] = None,
    no_save: NoSave = False,
) -> None:
    """Put a running container under a policy, or replace the policy that it has.

    The policy is saved: the container gets it again when it starts again, also after a reboot.
    """
    from graft.commands import unread, watcher_process
    from graft.commands.attach import attach as attach_container
    from graft.commands.cut_off import cut_off
    from graft.commands.policy_apply import check_served
    from graft.commands.policy_source import policy_of
    from graft.splice import client as splice

    wanted = None if transport == "auto" else Transport.parse(transport, "--transport")
    if relay not in (None, *splice.RELAYS):
        raise UsageError(f"--relay: {relay!r} is not a relay", "splice or kernel")
    require_root()
    settings = Settings.from_environment()
    rules = policy_of(settings, which.rstrip("/").rpartition("/")[2], policy, ingress or [], egress or [], deny)
    graft = Installation.open(settings)
    done = attach_container(graft, which, rules, wanted, relay, save=not no_save)
    watched = not done.saved or watcher_process.ensure_running(settings)
    say(*_attached_lines(done))
    if done.container.is_relayed and not done.unserved:
        say(*_relay_lines(splice.describe(settings, done.container)))
    if not watched:
        warn(*(f"graft: {line}" for line in watcher_process.warnings(settings)))
    warn(*cut_off(graft, {one.name for one in rules.endpoints}))
    check_served([done.unserved] if done.unserved else [])
    unread.check(done.container.name, done.unread)


def _attached_lines(done: Attached) -> list[str]:
    target, choice = done.target, done.choice
    lines = [f"{done.container.name}: {target.engine}, {target.cgroup}"]
    for inode, count in sorted(done.observed.namespaces.items()):
        whose = "the host's network namespace" if inode == done.observed.host else "a network namespace of its own,"
        lines.append(f"  {_count(count, 'process', 'processes')} in {whose} net:[{inode}]")
    if not done.observed.namespaces:
        lines.append("  no process yet")
    lines.append(f"  transport {choice.transport}: {choice.why}")
    if choice.why_not_better:
        lines.append(f"  no better transport: {choice.why_not_better}")
    if done.observed.outside and choice.transport is Transport.DIRECT:
        lines.append(f"  {done.observed.outside} of them are in namespaces of their own, where nothing is granted")
    lines.append(f"  policy {done.container.policy}" + (", which replaces the old one" if done.replaced else ""))
    lines += [
        f"  {field} has no effect: transport {choice.transport} relays TCP and UDP" for field in done.without_effect
    ]
    lines += [
        f"  {field} has no effect: a unix socket of the program's own is bound by a supervisor, and transport"
        f" {choice.transport} has none"
        for field in done.without_supervisor
    ]
    if done.existing is None:
        lines.append(
            "  cannot list the sockets that it had before: the kernel does not answer; they may receive nothing"
        )
        return lines
    if done.existing.sockets:
        lines.append("  existing sockets, which keep their addresses and connections:")
        lines += [f"    {sock}" for sock in done.existing.sockets]
    lines += _unsearched_lines(done.existing.unsearched) + _unlisted_lines(done.existing.doubts.names)
    lines += [f"  {sock} may receive nothing: no process lends it" for sock in done.cut_off]
    return lines + _late_lines(done.late)


def _late_lines(late: Sequence[ContainerSocket] | None) -> list[str]:
    if late is None:
        return ["  cannot list the sockets that it made meanwhile: the kernel does not answer"]
    from graft.state.inventory import is_cut_off

    lines = ["  made while it was attached, which keep their addresses and connections:"] if late else []
    lines += [f"    {sock}" + (", which may receive nothing" if is_cut_off(sock) else "") for sock in late]
    return lines


def _unsearched_lines(unsearched: Sequence[int]) -> list[str]:
    """Which processes may have sockets that are not listed."""
    shown = unsearched[:_MOST_UNSEARCHED]
    lines = [f"  process {pid} does not let its sockets be listed in time: there may be more" for pid in shown]
    if len(unsearched) > len(shown):
        lines.append(f"  nor do {len(unsearched) - len(shown)} other processes")
    return lines


def _unlisted_lines(kinds: Sequence[str]) -> list[str]:
    """Of which kinds it may have sockets that are not listed."""
    return [f"  the kernel does not list all {kind} sockets in time: there may be more" for kind in kinds]


def _relay_lines(relay: dict[str, Any]) -> list[str]:
    if not relay.get("serves", True):
        return [f"  not relayed yet: {relay.get('problem', 'graftd has not looked')}"]
    lines = [f"  relay {relay['relay']}, by graftd ({relay['pid']})"]
    lines += [f"  {one['address']} is relayed to its listener {one['listener']}" for one in relay["published"]]
    lines += [f"  cannot publish its listener {one['listener']}: {one['error']}" for one in relay["failed"]]
    lines += [f"  no rule for its listener {address}" for address in relay["not_granted"]]
    if relay["more_not_granted"]:
        lines.append(f"  and for {relay['more_not_granted']} more")
    if relay["too_many"]:
        lines.append(f"  {relay['too_many']} of these have a rule, but are too many for one container")
    if not relay["published"] and not relay["failed"]:
        lines.append("  no listener that a rule names yet: its endpoints refuse connections until there is one")
    return lines


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


@command
def detach(
    which: Which,
    keep: Annotated[
        bool, typer.Option("--keep-connections", help="Do not close connections through endpoints.")
    ] = False,
    no_save: NoSave = False,
) -> None:
    """Remove a container's policy, and close the sockets that it was granted; or stop waiting for the container."""
    from graft.commands import unread
    from graft.commands.detach import Detached
    from graft.commands.detach import detach as detach_container

    require_root()
    done = detach_container(Installation.open(Settings.from_environment()), which, keep, save=not no_save)
    if not isinstance(done, Detached):
        say(f"{done.target.text}: not waited for any more")
        unread.check(done.target.text, done.unread)
        return
    say(*_detached_lines(done))
    _raise_if_unfinished(done)
    unread.check(done.container.name, done.unread)


def _detached_lines(done: Detached) -> list[str]:
    withdrawal, lines = done.withdrawal, [f"{done.container.name}: detached"]
    for heading, found in (
        ("closed, because they depended on an endpoint", withdrawal.closed),
        ("not closed, though they depended on an endpoint", withdrawal.still_open),
        ("still open on the host's stack", withdrawal.kept),
    ):
        if found:
            lines.append(f"  {heading}:")
            lines += [f"    {sock}" for sock in found]
    return lines + _unsearched_lines(withdrawal.unsearched) + _unlisted_lines(withdrawal.doubts.names)


def _raise_if_unfinished(done: Detached) -> None:
    """Raises UnfinishedError if a socket that must be closed is still open, or may be."""
    withdrawal, name = done.withdrawal, done.container.name
    if done.unanswered:
        raise UnfinishedError(
            f"{name} has no policy any more, but graftd may have its relays open: {done.unanswered}",
            "`graft ps` shows graftd's process; when that has ended, nothing of them is left",
        )
    if not withdrawal.all_listed:
        raise UnfinishedError(
            f"cannot list the sockets of {name}: the kernel does not answer; some may still be open",
            "end the container to be sure",
        )
    if withdrawal.unfound:
        raise UnfinishedError(
            f"cannot list all TCP sockets of {name} in time: it had cgroups that are gone, or that somebody holds, and"
            " what was made there may still be open",
            "end the container to be sure",
        )
    if withdrawal.still_open:
        sockets = _count(len(withdrawal.still_open), "socket", "sockets")
        helper = f"process {withdrawal.helper_pid} continues to try; " if withdrawal.helper_pid else ""
        raise UnfinishedError(f"cannot close {sockets} of {name}", f"{helper}end the container to be sure")
