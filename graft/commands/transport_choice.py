"""Which transport a container can have, by the namespaces of its processes and its supervisor. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from graft.errors import RefusedError
from graft.model.transport import Transport

_NO_BETTER = "direct needs the host's namespace; swap needs a supervisor, but it was started without Graft"
_RESTART = "start it with `graft run` or the OCI runtime for the transports swap and born"


@dataclass(frozen=True, slots=True)
class Observed:
    """What decides a container's transport.

    ``host`` is the inode of the host's namespace, ``namespaces`` counts the container's processes by the inode of
    their namespace, ``attached`` is the transport that it has now (None: it is not attached).
    """

    host: int
    namespaces: dict[int, int] = field(default_factory=dict)
    attached: Transport | None = None

    @property
    def outside(self) -> int:
        """How many processes are in other namespaces than the host's."""
        return sum(count for inode, count in self.namespaces.items() if inode != self.host)


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """The transport, why, and why not a better one (empty if there is none)."""

    transport: Transport
    why: str
    why_not_better: str = ""


def choose_transport(observed: Observed, wanted: Transport | None = None) -> TransportChoice:
    """The best possible transport, or ``wanted``. Raises RefusedError if that one is not possible."""
    choice = _best(observed)
    if wanted is None or wanted is choice.transport:
        return choice
    hint = "leave --transport out" if choice.transport is Transport.DIRECT else _HINTS[wanted]
    raise RefusedError(f"--transport: {wanted} is impossible: {_why_not(wanted, choice)}", hint)


def stay_direct(observed: Observed, wanted: Transport | None = None) -> TransportChoice:
    """Direct for a container that had it and has left the host's namespace, for the sockets that it may have left there
    with. Without hooks it could use them as it likes.
    """
    return TransportChoice(Transport.DIRECT, "it had it; where it is now, nothing is granted")


def as_attached(observed: Observed, wanted: Transport | None = None) -> TransportChoice:
    """What an attached container has, wherever it is now and whatever was asked for: it keeps that while it runs."""
    return TransportChoice(observed.attached or _best(observed).transport, "it is attached with that")


_HINTS = {
    Transport.DIRECT: "--network host makes a container share the host's namespace",
    Transport.SWAP: _RESTART,
    Transport.BORN: _RESTART,
    Transport.SPLICE: "leave --transport out",
}


def _why_not(wanted: Transport, choice: TransportChoice) -> str:
    if wanted is Transport.DIRECT:
        return "it is in a network namespace of its own"
    if wanted.is_supervised and choice.transport is Transport.SPLICE:
        return "it was started without Graft, so it has no supervisor"
    if wanted.is_supervised and choice.transport.is_supervised:
        return "its policy decided that when it was started"
    if choice.transport is Transport.DIRECT:
        return "its sockets are already on the host's stack"
    return "its supervisor puts its sockets on the host's stack, so there is nothing to relay"


def _best(observed: Observed) -> TransportChoice:
    if observed.attached is not None and observed.attached.is_supervised:
        return TransportChoice(observed.attached, "it has a supervisor", "it is in a network namespace of its own")
    if observed.attached is Transport.SPLICE and not observed.namespaces:
        return TransportChoice(Transport.SPLICE, "graftd relays for it, though it has no process now", _NO_BETTER)
    if not observed.namespaces:
        return TransportChoice(
            Transport.DIRECT, "it has no process yet: those that start in the host's namespace are served"
        )
    if observed.host in observed.namespaces:
        return TransportChoice(Transport.DIRECT, "it shares the host's network namespace")
    if len(observed.namespaces) > 1:
        raise RefusedError(
            f"cgroup: its processes are in {len(observed.namespaces)} network namespaces, none of them the host's",
            "attach each container separately",
        )
    return TransportChoice(
        Transport.SPLICE,
        "it is already running, in a network namespace of its own",
        _NO_BETTER,
    )
