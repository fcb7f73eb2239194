"""What is run: endpoints, policies, calls, and what the operator changes meanwhile. Pure; JSON there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Transport = Literal["swap", "born", "direct", "splice"]
TRANSPORTS: tuple[Transport, ...] = ("swap", "born", "direct", "splice")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address of the host's; ``port`` 0: dynamic; ``last``: of a range of ports, 0: it is one. ``protocol``: tcp,
    udp or any.
    """

    name: str
    address: str
    port: int
    protocol: str = "any"
    dual_stack: bool = False
    last: int = 0

    @property
    def spec(self) -> str:
        """As Graft wants it."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port or 'dynamic'}" + (f"-{self.last}" if self.last else "")


@dataclass(frozen=True, slots=True)
class Ingress:
    """A bind of ``address`` (``*``: any) at ports ``first`` to ``last`` becomes the endpoint."""

    address: str
    first: int
    last: int
    endpoint: str


@dataclass(frozen=True, slots=True)
class Egress:
    """A destination: granted from the endpoint ``outcome``, or ``deny`` or ``container``. No ``ports``: all of them."""

    to: str
    ports: tuple[int, ...]
    outcome: str
    protocol: str = "any"


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy's rules and defaults; ``other`` empty: left out."""

    ingress: tuple[Ingress, ...] = ()
    egress: tuple[Egress, ...] = ()
    bind: str = "deny"
    connect: str = "deny"
    other: str = ""

    def text(self) -> str:
        """Its file. (JSON is YAML.)"""
        ingress = [
            {"bind": f"{_bracketed(one.address)}:{_ports(one.first, one.last)}", "endpoint": one.endpoint}
            for one in self.ingress
        ]
        defaults = {"bind": self.bind, "connect": self.connect}
        if self.other:
            defaults["other"] = self.other
        file = {
            "name": "fuzz",
            "ingress": ingress,
            "egress": [_egress(one) for one in self.egress],
            "default": defaults,
        }
        return json.dumps(file, indent=1)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _ports(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _egress(rule: Egress) -> dict[str, Any]:
    made: dict[str, Any] = {"to": rule.to}
    if rule.ports:
        made["ports"] = list(rule.ports)
    made["action" if rule.outcome in ("deny", "container") else "endpoint"] = rule.outcome
    if rule.protocol != "any":
        made["protocol"] = rule.protocol
    return made


@dataclass(frozen=True, slots=True)
class World:
    """What decides at one time: the endpoints that there are, and the policy in force."""

    endpoints: tuple[Endpoint, ...]
    policy: Policy

    def endpoint(self, name: str) -> Endpoint | None:
        """The endpoint of that name; None where there is none."""
        return next((one for one in self.endpoints if one.name == name), None)


@dataclass(frozen=True, slots=True)
class Change:
    """What the operator does: a policy is applied, or an endpoint added, moved (``ep set``) or deleted by name."""

    kind: Literal["apply", "add", "move", "delete"]
    policy: Policy | None = None
    endpoint: Endpoint | None = None
    name: str = ""

    def of(self, world: World) -> World:
        """The world after it, where Graft lets it be."""
        if self.kind == "apply":
            return replace(world, policy=self.policy or Policy())
        gone = self.endpoint.name if self.endpoint else self.name
        rest = tuple(one for one in world.endpoints if one.name != gone)
        return replace(world, endpoints=rest + ((self.endpoint,) if self.endpoint else ()))


@dataclass(frozen=True, slots=True)
class Phase:
    """Changes, then calls (lines of tests/programs/fuzzing.c after `c`), with more changes while those are made."""

    before: tuple[Change, ...]
    calls: tuple[str, ...]
    meanwhile: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Sequence:
    """All of it. ``seed`` says where it came from; ``defence`` which one has to be out for it to fail, ``known``
    why it fails though none is (kept ones).
    """

    seed: int
    transport: Transport
    world: World
    phases: tuple[Phase, ...]
    defence: str = ""
    known: str = ""

    @property
    def size(self) -> int:
        """How much there is to do."""
        return sum(len(one.before) + len(one.calls) + len(one.meanwhile) for one in self.phases)

    def to_json(self) -> str:
        """A file's text; equal for equal sequences."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Sequence:
        """The sequence of a file. Raises KeyError, TypeError, ValueError where it is none."""
        found = json.loads(text)
        return Sequence(
            found["seed"],
            found["transport"],
            _world(found["world"]),
            tuple(_phase(one) for one in found["phases"]),
            found.get("defence", ""),
            found.get("known", ""),
        )


def _world(found: Mapping[str, Any]) -> World:
    return World(tuple(Endpoint(**one) for one in found["endpoints"]), _policy(found["policy"]))


def _policy(found: Mapping[str, Any]) -> Policy:
    rules = {
        "ingress": tuple(Ingress(**one) for one in found["ingress"]),
        "egress": tuple(
            Egress(one["to"], tuple(one["ports"]), one["outcome"], one["protocol"]) for one in found["egress"]
        ),
    }
    return Policy(**{**found, **rules})


def _change(found: Mapping[str, Any]) -> Change:
    policy, endpoint = found["policy"], found["endpoint"]
    return Change(
        found["kind"], _policy(policy) if policy else None, Endpoint(**endpoint) if endpoint else None, found["name"]
    )


def _phase(found: Mapping[str, Any]) -> Phase:
    return Phase(
        tuple(_change(one) for one in found["before"]),
        tuple(found["calls"]),
        tuple(_change(one) for one in found["meanwhile"]),
    )
