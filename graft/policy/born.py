"""Which sockets of a container under a policy can be born on the host's stack: all of them, or those of UDP. Pure.

All can (transport born) where nothing is left to the container's own network stack: whatever no rule grants is refused,
and no rule keeps anything inside. The hooks then decide each bind, connect and send, and no supervisor needs to see
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import IPv6Address

from graft.model.endpoint import Endpoint, Protocol
from graft.policy.model import Default, Policy, Verdict


def why_not_born(policy: Policy, endpoints: Mapping[str, Endpoint]) -> str | None:
    """The first thing in ``policy`` that needs another transport; None if there is none.

    ``endpoints`` has those that its rules name.
    """
    return next(_obstacles(policy, endpoints), None)


def _obstacles(policy: Policy, endpoints: Mapping[str, Endpoint]) -> Iterator[str]:
    if policy.bind_default is not Default.DENY:
        yield "default.bind: what no rule grants stays in the container"
    if policy.connect_default is not Default.DENY:
        yield "default.connect: what no rule grants stays in the container"
    for egress in policy.egress:
        if egress.verdict is Verdict.CONTAINER:
            yield f"{egress.field}: it keeps {egress.to} in the container"
    for path in policy.unix_ingress:
        yield f"{path.field}: a supervisor binds the unix socket"
    for name, endpoint in endpoints.items():
        if endpoint.netns is not None:
            yield f"endpoint {name}: it is in another network namespace"
        if endpoint.unix is not None:
            yield f"endpoint {name}: its connections are relayed to or from the container's own namespace"
    # Only a supervisor can make a socket IPv6-only that its program has not made so.
    for ingress in policy.ingress:
        if _is_ipv6_only(endpoints.get(ingress.endpoint)):
            yield f"{ingress.field}: endpoint {ingress.endpoint} is IPv6-only at [::]"
    for egress in policy.egress:
        source = endpoints.get(egress.endpoint) if egress.endpoint is not None else None
        if source is not None and source.port and _is_ipv6_only(source):
            yield f"{egress.field}: endpoint {egress.endpoint} is an IPv6-only port at [::]"


def _is_ipv6_only(endpoint: Endpoint | None) -> bool:
    return endpoint is not None and endpoint.address == IPv6Address(0) and not endpoint.dual_stack


def grants_datagrams(policy: Policy, endpoints: Mapping[str, Endpoint]) -> bool:
    """Whether ``policy`` grants anything for UDP: then, in transport swap, UDP sockets are born on the host's stack."""
    named = [(rule.endpoint, rule.protocols) for rule in policy.ingress]
    named += [(rule.endpoint, rule.protocols) for rule in policy.egress if rule.endpoint]
    return any(
        name in endpoints and endpoints[name].protocols & (protocols or endpoints[name].protocols) & Protocol.UDP
        for name, protocols in named
    )
