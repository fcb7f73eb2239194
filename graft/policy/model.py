"""What a container may do on the host's stack, as values: rules of ingress, rules of egress, defaults.

A policy comes from a file (graft/policy/reader.py) or from the flags of `graft run` (`policy_from_flags`).
graft/policy/validator.py checks whether its rules fit their endpoints and each other, and graft/policy/compiler.py
makes map entries of it. docs/policy.md is the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from graft.errors import UsageError
from graft.model.address import BindPattern, Prefix
from graft.model.endpoint import (
    MAX_POLICY_NAME,
    Endpoint,
    Protocol,
    parse_egress_flag,
    parse_ingress_flag,
    parse_name,
    parse_unix_flag,
)
from graft.model.ports import EVERY_PORT, PortRange, mask_of
from graft.model.unix_socket import is_unix
from graft.policy.policy_file import PolicyFile


class Default(IntEnum):
    """What happens to a call that no rule matches: GRAFT_DEFAULT_* of bpf/graft.h."""

    CONTAINER = 0
    DENY = 1


class Verdict(IntEnum):
    """What happens to a destination that an egress rule matches: GRAFT_VERDICT_* of bpf/graft.h."""

    NONE = 0
    GRANT = 1
    DENY = 2
    CONTAINER = 3


class Origin(IntEnum):
    """Who has written a policy, and who has chosen it."""

    OPERATOR = 0
    ASKED = 1
    """The operator's, which a container has named in its environment, as its image may have."""
    PAIRS = 2
    """That environment's own."""


@dataclass(frozen=True, slots=True)
class IngressRule:
    """A bind that ``bind`` matches is redirected to ``endpoint``.

    ``protocols`` None means all that the endpoint has. ``field`` and ``line`` are where the rule is written, for
    messages.
    """

    bind: BindPattern
    endpoint: str
    protocols: Protocol | None = None
    field: str = dataclasses.field(default="ingress", compare=False)
    line: int | None = dataclasses.field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class UnixRule:
    """A bind of a unix socket to exactly ``path`` is made at the path of ``endpoint`` on the host."""

    path: str
    endpoint: str
    field: str = dataclasses.field(default="ingress", compare=False)
    line: int | None = dataclasses.field(default=None, compare=False)


class Outcome(NamedTuple):
    """A verdict, and the endpoint that is the source where it is GRANT. ``is_named``: a GRANT for one IPv4 address,
    which may be a broadcast address.
    """

    verdict: Verdict
    endpoint: str | None
    is_named: bool = False


@dataclass(frozen=True, slots=True)
class EgressRule:
    """Destinations in ``to``, at ``ports`` (None: at every port), get ``verdict``.

    ``endpoint`` is the source of a GRANT, None otherwise. ``protocols`` None means all that the endpoint
    has; without an endpoint, TCP and UDP, and ICMP too in a policy that has a rule for it.
    """

    to: Prefix
    verdict: Verdict
    endpoint: str | None = None
    ports: tuple[PortRange, ...] | None = None
    protocols: Protocol | None = None
    field: str = dataclasses.field(default="egress", compare=False)
    line: int | None = dataclasses.field(default=None, compare=False)

    @property
    def outcome(self) -> Outcome:
        """What happens to a destination that the rule matches."""
        is_address = self.to.family == 4 and self.to.length == 32
        return Outcome(self.verdict, self.endpoint, is_address and self.verdict is Verdict.GRANT)

    @property
    def port_mask(self) -> int:
        """The rule's ports as a set (graft/model/ports.py)."""
        return EVERY_PORT if self.ports is None else mask_of(self.ports)


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy; its endpoints are those that it declares itself.

    ``other_default`` is for sockets on the host's stack that no rule can match (SCTP, UDP-Lite, ICMP, raw); None: deny
    them where anything else is denied.
    """

    name: str
    endpoints: tuple[Endpoint, ...] = ()
    ingress: tuple[IngressRule, ...] = ()
    egress: tuple[EgressRule, ...] = ()
    bind_default: Default = Default.CONTAINER
    connect_default: Default = Default.CONTAINER
    open: bool = False
    other_default: Default | None = None
    unix_ingress: tuple[UnixRule, ...] = ()
    origin: Origin = Origin.OPERATOR
    file: PolicyFile | None = dataclasses.field(default=None, compare=False)
    """Where it was read just now."""

    @property
    def every_ingress(self) -> tuple[IngressRule | UnixRule, ...]:
        """The ingress rules of both kinds."""
        return *self.ingress, *self.unix_ingress

    @property
    def names_icmp(self) -> bool:
        """Whether a rule is for ICMP: sockets that ping may be made then, and the rules judge what they send."""
        return any(rule.protocols is not None and rule.protocols & Protocol.ICMP for rule in self.egress)

    def resolve(self, known: Mapping[str, Endpoint]) -> dict[str, Endpoint]:
        """Endpoints by name: the ``known`` ones, and over them those that the policy declares."""
        return {**known, **{endpoint.name: endpoint for endpoint in self.endpoints}}


@dataclass(frozen=True, slots=True)
class Problem:
    """One error in a policy: where, what, and what would be right."""

    line: int | None
    field: str
    message: str
    hint: str | None = None

    def format(self, source: str) -> str:
        """``SOURCE:LINE: FIELD: MESSAGE (HINT)``."""
        where = source if self.line is None else f"{source}:{self.line}"
        hint = f" ({self.hint})" if self.hint else ""
        return f"{where}: {self.field}: {self.message}{hint}"


class PolicyError(UsageError):
    """An invalid policy; ``problems`` has every error, the message only the first."""

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        first, more = self.problems[0], len(self.problems) - 1
        text = Problem(first.line, first.field, first.message).format(source)
        super().__init__(f"{text} (and {more} more)" if more else text, first.hint)

    def lines(self) -> list[str]:
        """A line for each problem: with its line in a file, or with the flag that it is in."""
        return [problem.format("graft" if problem.line is None else self.source) for problem in self.problems]


def policy_from_flags(
    name: str, ingress_flags: Iterable[str], egress_flags: Iterable[str], deny: bool = False
) -> Policy:
    """The policy that `graft run`'s ``-i``, ``-e`` and ``--deny`` make. Raises UsageError that names the flag."""
    parse_name(name, longest=MAX_POLICY_NAME)
    default = Default.DENY if deny else Default.CONTAINER
    ingress, unix_ingress = ingress_rules(ingress_flags)
    return Policy(
        name=name,
        ingress=ingress,
        egress=tuple(_egress_rule(text) for text in egress_flags),
        bind_default=default,
        connect_default=default,
        unix_ingress=unix_ingress,
    )


def ingress_rules(flags: Iterable[str], field: str = "-i") -> tuple[tuple[IngressRule, ...], tuple[UnixRule, ...]]:
    """The rules of ``-i`` flags, those for addresses and those for unix paths. Raises UsageError."""
    addresses: list[IngressRule] = []
    paths: list[UnixRule] = []
    for text in flags:
        here = f"{field} {text}"
        if is_unix(text):
            paths.append(UnixRule(*parse_unix_flag(text, field), field=here))
        else:
            addresses.append(IngressRule(*parse_ingress_flag(text, field), field=here))
    return tuple(addresses), tuple(paths)


def _egress_rule(text: str) -> EgressRule:
    to, endpoint = parse_egress_flag(text)
    return EgressRule(to, Verdict.GRANT, endpoint, field=f"-e {text}")
