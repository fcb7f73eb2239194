"""`graft explain`: which rule decides about an address, and what would happen, by the kernel's own lookup.

The maps are asked as the hooks ask them; the rule is shown as `graft policy show` does. What no lookup tells is said in
words: what a socket's own state changes is not known here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from graft.commands.policy_show import ActiveRule, policy_in_force
from graft.commands.rule_in_force import deciding_bind, deciding_destination
from graft.datapath.rulesets import Lookup
from graft.errors import NotFoundError, UsageError
from graft.model.address import IPAddress, SocketAddress, format_ip, pack16
from graft.model.endpoint import IP_PROTOCOLS, PROTOCOLS, Endpoint, Protocol
from graft.model.transport import Transport
from graft.policy.model import Default, Verdict
from graft.state.installation import Installation
from graft.state.records import Container

CALLS = ("bind", "connect")
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would happen. ``verdict`` is granted, refused or container; ``rule`` is None where the default decides."""

    container: str
    call: str
    protocol: str
    address: str
    verdict: str
    endpoint: str | None
    rule: ActiveRule | None
    text: str

    @property
    def record(self) -> dict[str, Any]:
        """For programs."""
        return {
            "container": self.container,
            "call": self.call,
            "protocol": self.protocol,
            "address": self.address,
            "verdict": self.verdict,
            "endpoint": self.endpoint,
            "rule": None if self.rule is None else str(self.rule),
            "text": self.text,
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        decides = "the policy's default" if self.rule is None else str(self.rule)
        return [
            f"{self.container}: {self.call} {self.protocol} {self.address}: {self.text}",
            f"  decided by: {decides}",
        ]


def parse_protocol(text: str) -> Protocol:
    """tcp, udp or icmp. Raises UsageError."""
    try:
        return PROTOCOLS[text]
    except KeyError:
        raise UsageError(f"--proto: no such protocol: {text!r}", "tcp, udp or icmp") from None


def explain(
    graft: Installation, container: Container, call: str, address: SocketAddress, protocol: Protocol
) -> Explanation:
    """What would happen if a program of the container did that now. Raises UsageError, NotFoundError."""
    if call not in CALLS:
        raise UsageError(f"call: no such call: {call!r}", "bind or connect")
    if protocol is Protocol.ICMP and call == "bind":
        raise UsageError("--proto: icmp has no ports to bind", "connect")
    asked = _Asked(graft, container, address, protocol)
    return asked.bind() if call == "bind" else asked.connect()


class _Asked:
    """One question, about one address."""

    def __init__(self, graft: Installation, container: Container, address: SocketAddress, protocol: Protocol) -> None:
        self._graft, self._container = graft, container
        self._address, self._protocol = address, protocol
        value = graft.maps.containers.get(ctypes.c_uint32(container.id))
        if value is None:
            raise NotFoundError(f"container: {container.name!r} is not attached", "graft ps")
        self._bind_default, self._connect_default = Default(value.bind_default), Default(value.connect_default)
        self._ruleset = int(value.ruleset)
        self._lookup = Lookup(graft.maps)
        self._rules = policy_in_force(graft, container).rules

    def bind(self) -> Explanation:
        ip, port = self._address.ip, self._address.port
        number, first = self._lookup.ingress(self._ruleset, IP_PROTOCOLS[self._protocol], ip.version, pack16(ip), port)
        endpoint = self._graft.endpoints.by_id().get(number) if number else None
        rule = deciding_bind(self._rules, self._protocol.label, ip, port)
        if endpoint is None:
            return self._by_default("bind", self._bind_default, rule if number else None)
        if not endpoint.protocols & self._protocol:
            return self._refused("bind", rule, endpoint, f"{endpoint.name} is not for {self._protocol.label}")
        return self._made("bind", "granted", endpoint, rule, self._bound_at(endpoint, port, first))

    def _bound_at(self, endpoint: Endpoint, port: int, first: int) -> str:
        if endpoint.unix is not None:
            return f"served at {endpoint.format()}, by graftd"
        real = endpoint.port + port - first if endpoint.last_port and first else endpoint.port
        where = str(SocketAddress(endpoint.address, real)) if real else f"{format_ip(endpoint.address)}, a free port"
        how = "published by graftd at" if self._container.transport is Transport.SPLICE else "becomes"
        return f"{how} {endpoint.name} {where} on the host's stack"

    def connect(self) -> Explanation:
        ip, port = self._destination(), self._address.port
        verdict, number = self._lookup.egress(self._ruleset, IP_PROTOCOLS[self._protocol], ip.version, pack16(ip), port)
        rule = deciding_destination(self._rules, self._protocol.label, ip, port)
        if verdict == Verdict.DENY:
            return self._refused("connect", rule, None, "a rule denies it")
        if verdict == Verdict.CONTAINER:
            return self._made("connect", "container", None, rule, "left to the container's own stack")
        endpoint = self._graft.endpoints.by_id().get(number) if verdict == Verdict.GRANT else None
        if endpoint is None:
            return self._by_default("connect", self._connect_default, None if verdict == Verdict.NONE else rule)
        return self._made("connect", "granted", endpoint, rule, self._left_from(endpoint))

    def _destination(self) -> IPAddress:
        """The unspecified address is judged as loopback (bpf/rules.bpf.c)."""
        ip = self._address.ip
        return type(ip)(_LOOPBACK[ip.version]) if not int(ip) else ip

    def _left_from(self, endpoint: Endpoint) -> str:
        if endpoint.unix is not None:
            return f"to {endpoint.format()}, by graftd"
        by = ", by graftd" if self._container.transport is Transport.SPLICE else ""
        return f"leaves the host's stack from {endpoint.format()}{by}"

    def _by_default(self, call: str, default: Default, rule: ActiveRule | None) -> Explanation:
        if default is Default.DENY:
            return self._refused(call, rule, None, "no rule grants it, and the default is deny")
        own = "left to the container's own stack"
        if self._container.transport is Transport.DIRECT:
            own = "left alone: the container shares the host's stack"
        return self._made(call, "container", None, rule, f"{own}, by the default")

    def _refused(self, call: str, rule: ActiveRule | None, endpoint: Endpoint | None, why: str) -> Explanation:
        return self._made(call, "refused", endpoint, rule, f"refused (EACCES): {why}")

    def _made(
        self, call: str, verdict: str, endpoint: Endpoint | None, rule: ActiveRule | None, text: str
    ) -> Explanation:
        return Explanation(
            self._container.name,
            call,
            self._protocol.label,
            str(self._address),
            verdict,
            None if endpoint is None else endpoint.name,
            rule,
            text,
        )
