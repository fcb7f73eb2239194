"""Which transport serves a container, by what there is: the namespaces of its processes, a supervisor. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from graft.errors import RefusedError
from graft.model.transport import Transport

_NO_BETTER = "direct needs the host's namespace; swap needs a supervisor, and it was started without Graft"
_RESTART = "start it with `graft run` or the OCI runtime for the swap transport"


@dataclass(frozen=True, slots=True)
class Observed:
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
class TransportChoice:
    """The transport that serves, why, and why not a better one (empty where there is none)."""

    transport: Transport
    why: str
    why_not_better: str = ""


def choose_transport(observed: Observed, wanted: Transport | None = None) -> TransportChoice:
    """The best transport that is possible, or ``wanted``. Raises RefusedError where that one is impossible."""
    choice = _best(observed)
    if wanted is None or wanted is choice.transport:
        return choice
    hint = "leave --transport out" if choice.transport is Transport.DIRECT else _HINTS[wanted]
    raise RefusedError(f"--transport: {wanted} is impossible: {_why_not(wanted, choice)}", hint)


_HINTS = {
    Transport.DIRECT: "--network host makes a container share the host's namespace",
    Transport.SWAP: _RESTART,
    Transport.SPLICE: "leave --transport out",
}


def _why_not(wanted: Transport, choice: TransportChoice) -> str:
    if wanted is Transport.DIRECT:
        return "it lives in a network namespace of its own"
    if wanted is Transport.SWAP and choice.transport is Transport.SPLICE:
        return "it was started without Graft, so that no supervisor gets its calls"
    if choice.transport is Transport.DIRECT:
        return "its sockets are on the host's stack already"
    return "its supervisor puts its sockets on the host's stack, and there is nothing left to relay"


def _best(observed: Observed) -> TransportChoice:
    if observed.attached is Transport.SWAP:
        return TransportChoice(Transport.SWAP, "its supervisor serves it", "it lives in a network namespace of its own")
    if observed.attached is Transport.SPLICE and not observed.namespaces:
        return TransportChoice(Transport.SPLICE, "its relay serves it, though nothing runs in it now", _NO_BETTER)
    if not observed.namespaces:
        return TransportChoice(
            Transport.DIRECT, "nothing runs in it yet: what starts in the host's namespace is served"
        )
    if observed.host in observed.namespaces:
        return TransportChoice(Transport.DIRECT, "it shares the host's network namespace")
    if len(observed.namespaces) > 1:
        raise RefusedError(
            f"cgroup: its processes live in {len(observed.namespaces)} network namespaces, none of them the host's",
            "attach each container by itself",
        )
    return TransportChoice(
        Transport.SPLICE,
        "it runs already, in a network namespace of its own",
        _NO_BETTER,
    )
