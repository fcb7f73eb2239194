"""`graft attach` and `graft detach`: a container that runs already comes under a policy, or leaves it.

What there is (the namespaces of its processes, a supervisor) decides which transport can serve it. The choice
is a pure function; around it stand finding the container, and handing the policy to graft/containers.py.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from graft import containers, held, splice, store
from graft.containers import Container
from graft.engines import Target, resolve
from graft.errors import NotFoundError, RefusedError
from graft.held import Held
from graft.kernel import cgroup, netns
from graft.layout import Transport
from graft.lifecycle import up
from graft.maps import Maps
from graft.policy import Policy
from graft.policy_rules import grants_without_tcp
from graft.settings import Settings
from graft.withdrawal import Withdrawn, withdraw

_NO_BETTER = "direct needs the host's namespace; swap needs a supervisor, and it was started without Graft"
_RESTART = "start it with `graft run` or the OCI runtime for the swap transport"


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides a container's transport.

    ``host`` is the inode of the host's namespace, ``namespaces`` counts the container's processes by the
    inode of theirs, ``attached`` is the transport that serves it already.
    """

    host: int
    namespaces: dict[int, int] = field(default_factory=dict)
    attached: Transport | None = None

    @property
    def outside(self) -> int:
        """How many processes live in other namespaces than the host's."""
        return sum(count for inode, count in self.namespaces.items() if inode != self.host)


@dataclass(frozen=True, slots=True)
class Choice:
    """The transport that serves, why, and why not a better one (empty where there is none)."""

    transport: Transport
    why: str
    why_not_better: str = ""


def choose_transport(facts: Facts, wanted: Transport | None = None) -> Choice:
    """The best transport that is possible, or ``wanted``. Raises RefusedError where that one is impossible."""
    choice = _best(facts)
    if wanted is None or wanted is choice.transport:
        return choice
    hint = "leave --transport out" if choice.transport is Transport.DIRECT else _HINTS[wanted]
    raise RefusedError(f"--transport: {wanted.name.lower()} is impossible: {_why_not(wanted, choice)}", hint)


_HINTS = {
    Transport.DIRECT: "--network host makes a container share the host's namespace",
    Transport.SWAP: _RESTART,
    Transport.SPLICE: "leave --transport out",
}


def _why_not(wanted: Transport, choice: Choice) -> str:
    if wanted is Transport.DIRECT:
        return "it lives in a network namespace of its own"
    if wanted is Transport.SWAP and choice.transport is Transport.SPLICE:
        return "it was started without Graft, so that no supervisor gets its calls"
    if choice.transport is Transport.DIRECT:
        return "its sockets are on the host's stack already"
    return "its supervisor puts its sockets on the host's stack, and there is nothing left to relay"


def _best(facts: Facts) -> Choice:
    if facts.attached is Transport.SWAP:
        return Choice(Transport.SWAP, "its supervisor serves it", "it lives in a network namespace of its own")
    if facts.attached is Transport.SPLICE and not facts.namespaces:
        return Choice(Transport.SPLICE, "its relay serves it, though nothing runs in it now", _NO_BETTER)
    if not facts.namespaces:
        return Choice(Transport.DIRECT, "nothing runs in it yet: what starts in the host's namespace is served")
    if facts.host in facts.namespaces:
        return Choice(Transport.DIRECT, "it shares the host's network namespace")
    if len(facts.namespaces) > 1:
        raise RefusedError(
            f"cgroup: its processes live in {len(facts.namespaces)} network namespaces, none of them the host's",
            "attach each container by itself",
        )
    return Choice(
        Transport.SPLICE,
        "it runs already, in a network namespace of its own",
        _NO_BETTER,
    )


def look(settings: Settings, path: Path, attached: Container | None) -> Facts:
    """The facts of the cgroup at ``path``."""
    counted: Counter[int] = Counter()
    for pid in cgroup.processes(path):
        with contextlib.suppress(OSError):  # one that ended meanwhile
            counted[os.stat(f"/proc/{pid}/ns/net").st_ino] += 1
    transport = None if attached is None else Transport[attached.transport.upper()]
    return Facts(os.stat(settings.host_netns).st_ino, dict(counted), transport)


@dataclass(frozen=True, slots=True)
class Attached:
    """What `attach` found and did; ``existing`` are the sockets that were there before the policy (None: not known).

    ``without_effect`` are fields of rules that this transport does not serve.
    """

    target: Target
    facts: Facts
    choice: Choice
    container: Container
    replaced: bool
    existing: tuple[Held, ...] | None = ()
    without_effect: tuple[str, ...] = ()


def attach(
    settings: Settings, text: str, policy: Policy, wanted: Transport | None = None, relay: str | None = None
) -> Attached:
    """Put the container that ``text`` names under ``policy``, or replace the policy that it has.

    ``relay`` (splice, kernel) is how transport splice moves bytes; None leaves it as it is, or to splice.
    Raises NotFoundError, ConflictError, RefusedError, PolicyError, KernelError; nothing is changed then.
    """
    target = resolve(text) if not _is_attached_name(settings, text) else _known(settings, text)
    maps = up(settings)
    containers.reap(settings, maps)
    known = containers.at(settings, target.cgroup)
    facts = look(settings, target.cgroup, known)
    choice = choose_transport(facts, wanted)
    if relay is not None:
        _check_relay(settings, choice, relay)
    if known is not None:
        if known.transport != choice.transport.name.lower():
            raise RefusedError(
                f"cgroup: it is attached by {known.transport}, and {choice.transport.name.lower()} is what serves now",
                "graft detach it first",
            )
        name = target.name if target.engine in ("docker", "podman", "systemd") else None
        changed = containers.apply(settings, maps, known, policy, name, relay)
        if choice.transport is Transport.SPLICE:
            splice.attach(settings, maps, changed, 0)
        return Attached(
            target, facts, choice, changed, replaced=True, without_effect=_unserved(settings, choice, policy)
        )
    if choice.transport is Transport.SPLICE:
        served = _splice(settings, maps, target, policy, relay or "splice")
        return Attached(
            target, facts, choice, served, replaced=False, without_effect=_unserved(settings, choice, policy)
        )
    existing = held.in_host(settings, cgroup.processes(target.cgroup))
    container = containers.create(
        settings,
        maps,
        policy,
        target.cgroup,
        netns.cookie(settings.host_netns),
        choice.transport,
        name=target.name,
        engine=target.engine,
        prepare=lambda number: held.mark_heard(settings, number, existing or ()),
    )
    return Attached(
        target, facts, choice, container, replaced=False, existing=None if existing is None else tuple(existing)
    )


def _is_attached_name(settings: Settings, text: str) -> bool:
    return any(text == one.name and one.engine == "graft" and one.is_there for one in containers.listing(settings))


def _known(settings: Settings, text: str) -> Target:
    """A container that Graft started is found by the name that `graft ps` shows."""
    container = containers.find(settings, text)
    pid = next(iter(cgroup.processes(container.cgroup_path)), 0)
    return Target(container.cgroup_path, container.engine, container.name, str(container.id), pid)


def _unserved(settings: Settings, choice: Choice, policy: Policy) -> tuple[str, ...]:
    if choice.transport is Transport.DIRECT:
        return ()
    known = policy.resolve({stored.endpoint.name: stored.endpoint for stored in store.listing(settings)})
    return grants_without_tcp(policy, known)


def _check_relay(settings: Settings, choice: Choice, relay: str) -> None:
    if choice.transport is not Transport.SPLICE:
        name = choice.transport.name.lower()
        raise RefusedError(f"--relay: transport {name} has none: {choice.why}", "leave --relay out")
    splice.check_relay(settings, relay)


def _splice(settings: Settings, maps: Maps, target: Target, policy: Policy, relay: str) -> Container:
    """Its hooks, and a daemon that serves it. Nothing is left of it where that fails."""
    splice.prepare(settings)
    pid = next(iter(cgroup.processes(target.cgroup)), target.pid)
    try:
        cookie = netns.cookie(Path(f"/proc/{pid}/ns/net"))
    except FileNotFoundError:
        raise NotFoundError(f"cgroup: the processes of {target.name} have ended") from None
    container = containers.create(
        settings,
        maps,
        policy,
        target.cgroup,
        cookie,
        Transport.SPLICE,
        name=target.name,
        engine=target.engine,
        relay=relay,
    )
    try:
        splice.attach(settings, maps, container, pid)
    except BaseException:
        containers.remove(settings, maps, container)
        raise
    return container


def apply(settings: Settings, policy: Policy, text: str | None = None) -> list[Container]:
    """Replace the policy of the container ``text``, or of every one whose policy has the same name.

    Raises NotFoundError where there is none, PolicyError, ConflictError.
    """
    maps = up(settings)
    containers.reap(settings, maps)
    if text is not None:
        chosen = [find(settings, text)]
    else:
        chosen = [one for one in containers.listing(settings) if one.policy == policy.name]
    if not chosen:
        raise NotFoundError(f"no container has a policy of the name {policy.name!r}", "graft ps; --cgroup names one")
    changed = [containers.apply(settings, maps, container, policy) for container in chosen]
    for container in changed:
        if container.transport == Transport.SPLICE.name.lower():
            splice.attach(settings, maps, container, 0)
    return changed


@dataclass(frozen=True, slots=True)
class Detached:
    """What `detach` did: the container, and what became of its sockets."""

    container: Container
    sockets: Withdrawn


def find(settings: Settings, text: str) -> Container:
    """The attached container that ``text`` means: a name or id of `graft ps`, or what `graft attach` takes.

    Raises NotFoundError.
    """
    with contextlib.suppress(NotFoundError):
        return containers.find(settings, text)
    target = resolve(text)
    found = containers.at(settings, target.cgroup)
    if found is None:
        raise NotFoundError(f"cgroup: {target.name} is not attached", "graft ps")
    return found


def detach(settings: Settings, text: str, keep_connections: bool = False) -> Detached:
    """Take a container's policy away: no rule holds from the next call on, and what it was granted ends.

    Its listeners stop listening, and its connections through endpoints end, unless ``keep_connections``.
    Raises NotFoundError.
    """
    maps = up(settings)
    containers.reap(settings, maps)
    container = find(settings, text)
    with held.host_stack(settings) as stack:  # some endpoints may go with the container
        containers.remove(settings, maps, container)
        if container.transport == Transport.SPLICE.name.lower():
            splice.detach(settings, container)
        return Detached(container, withdraw(settings, container, stack, keep_connections))
