"""In which network namespace should this socket live? A pure function from a trapped call to an action.

    bind      rule, in the container         -> replaced by a socket of the host's stack that is bound already
              UDP, an IPv6-only endpoint     -> made IPv6-only where it is, and the call runs
              UDP, no address, port 0        -> bound where it is, on the host's stack, and reached from both sides
    connect   rule, in the container         -> replaced by a socket of the host's stack; the call runs on that
    either    rule for a unix socket         -> the same as without a rule: graftd relays, in the container
    either    no rule, in the host's stack   -> replaced by a socket of the container, if it is not bound
    listen    in the host's stack, unbound   -> refused: the kernel would pick a port that no rule grants
    all else                                 -> the call runs; the hooks decide

What was read from the program's memory is a hint: the program may change it until the kernel copies it. A
wrong decision here leads to a refusal by the hooks, never to an address that was not granted.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from graft.datapath.layout import ENDPOINT_DUAL_STACK, ENDPOINT_HAS_PORT, ENDPOINT_UNIX
from graft.model.sockaddr import Sockaddr
from graft.model.transport import Home
from graft.policy.model import Default, Verdict

IPPROTO_UDP = 17
TCP_CLOSE = 7  # include/net/tcp_states.h: neither connected, nor connecting, nor listening


class Call(enum.IntEnum):
    """The trapped system calls (GRAFT_CALL_*)."""

    BIND = 0
    CONNECT = 1
    LISTEN = 2


class SocketFacts(NamedTuple):
    """What the hooks know about the socket of a trapped call (struct desk, bpf/graft.h).

    Namespaces are cookies. ``endpoint`` is the id of the endpoint in the rule that matches, ``verdict`` that rule's
    verdict. ``local_port`` is 0 where the socket has none; ``bound``: its address is that of an endpoint which is
    granted now.
    """

    netns: int
    container_netns: int
    endpoint_netns: int
    endpoint: int
    local_port: int
    home: int
    family: int
    state: int
    bound: int
    verdict: int
    endpoint_family: int
    bind_default: int
    connect_default: int
    protocol: int
    endpoint_flags: int

    @property
    def endpoint_is_ipv6_only(self) -> bool:
        """Whether a socket that is bound to the endpoint must not take the IPv4 port too."""
        return self.endpoint_family == 6 and not self.endpoint_flags & ENDPOINT_DUAL_STACK

    @property
    def endpoint_is_unix(self) -> bool:
        """Whether the endpoint is a unix socket, so that the program's socket stays in the container."""
        return bool(self.endpoint and self.endpoint_flags & ENDPOINT_UNIX)


class Action(enum.Enum):
    """What to do with a trapped call."""

    RESUME = "resume"
    TO_HOST = "to host"
    TO_CONTAINER = "to container"
    TO_BOTH = "to both"
    IPV6_ONLY = "IPv6 only"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Decision:
    """An action; TO_HOST with an endpoint's id and its namespace's cookie, REFUSE with an errno.

    IPV6_ONLY: the socket becomes that, and the call runs. TO_BOTH: a datagram socket on the host's stack gets a port of
    the kernel's choice there, and is reached from inside.
    ``v6only``: the replacement socket is IPv6-only, also where the socket is not.
    """

    action: Action
    endpoint: int = 0
    netns: int = 0
    error: int = 0
    v6only: bool = False


RESUME = Decision(Action.RESUME)
_TO_CONTAINER = Decision(Action.TO_CONTAINER)
_TO_BOTH = Decision(Action.TO_BOTH)
_IPV6_ONLY = Decision(Action.IPV6_ONLY)
_REFUSED = Decision(Action.REFUSE, error=errno.EACCES)


@lru_cache(maxsize=1024)
def decide(call: Call, address: Sockaddr | None, facts: SocketFacts, v6only: bool = False) -> Decision:
    """What to do with ``call``. ``v6only``: the socket is an IPv6-only one."""
    if facts.state != TCP_CLOSE and not (facts.protocol == IPPROTO_UDP and call is Call.CONNECT):
        return RESUME  # (a datagram socket may be connected again, to the other world)
    if facts.home == Home.CONTAINER and facts.netns != facts.container_netns:
        return RESUME  # in a namespace that the program made itself, or a socket that it received
    if call is Call.LISTEN:
        if facts.protocol == IPPROTO_UDP:
            return RESUME  # the kernel's EOPNOTSUPP
        return _REFUSED if facts.home == Home.HOST and not facts.bound else RESUME
    if address is None or not _matches_family(address, facts.family):
        return RESUME
    if call is Call.BIND:
        return _decide_bind(address, facts, v6only)
    return _decide_connect(facts, v6only)


def _matches_family(address: Sockaddr, family: int) -> bool:
    """Whether a socket of ``family`` can have the address at all; if not, the kernel reports it."""
    return (address.family == 6 or address.mapped) == (family == 6)


def _decide_bind(address: Sockaddr, facts: SocketFacts, v6only: bool) -> Decision:
    if facts.local_port:
        return RESUME  # bound already: the kernel's EINVAL
    if facts.endpoint_is_unix:
        return _decide_without_rule(facts, Default.CONTAINER)
    # An IPv6-only socket cannot have an IPv4 endpoint.
    if facts.endpoint and not (facts.endpoint_family == 4 and address.family == 6 and v6only):
        only = facts.endpoint_is_ipv6_only and facts.family == 6
        if facts.home == Home.HOST and facts.endpoint_netns == facts.netns:
            if v6only or not only:
                return RESUME
            if facts.protocol == IPPROTO_UDP:
                return _IPV6_ONLY  # it keeps what the program has done to it: groups that it joined, what it received
        return Decision(Action.TO_HOST, facts.endpoint, facts.endpoint_netns, v6only=only)
    if facts.protocol == IPPROTO_UDP and facts.home == Home.HOST and _names_nothing(address):
        return _REFUSED if facts.bind_default == Default.DENY else _TO_BOTH
    return _decide_without_rule(facts, facts.bind_default)


def _names_nothing(address: Sockaddr) -> bool:
    return not address.port and not address.mapped and not any(address.address)


def _decide_connect(facts: SocketFacts, v6only: bool) -> Decision:
    if facts.verdict == Verdict.DENY:
        return _REFUSED
    if facts.verdict == Verdict.GRANT and facts.endpoint_is_unix:
        return _decide_without_rule(facts, Default.CONTAINER)
    if facts.verdict == Verdict.GRANT:
        # Only a source with a port of its own is bound, and so takes the IPv4 port along.
        only = facts.endpoint_is_ipv6_only and bool(facts.endpoint_flags & ENDPOINT_HAS_PORT)
        if facts.home == Home.HOST and (
            facts.bound or (facts.endpoint_netns == facts.netns and (v6only or not only or facts.local_port))
        ):
            return RESUME
        return Decision(Action.TO_HOST, facts.endpoint, facts.endpoint_netns, v6only=only)
    to_container = facts.verdict == Verdict.CONTAINER
    return _decide_without_rule(facts, Default.CONTAINER if to_container else facts.connect_default)


def _decide_without_rule(facts: SocketFacts, default: int) -> Decision:
    if facts.home == Home.CONTAINER:
        return RESUME  # it stays in the container, and the hooks apply the default
    if facts.bound or default == Default.DENY:
        return _REFUSED
    return _TO_CONTAINER
