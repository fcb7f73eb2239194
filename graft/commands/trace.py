"""`graft trace`: every decision of the hooks as it happens, with names instead of numbers.

What a decision was about comes from the kernel; the rule is looked up here, in the rules that are in force when its
event is read. Names of processes are those that programs gave themselves: they are for people, and nothing is decided
by them.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from graft.commands.policy_show import ActiveRule, policy_in_force
from graft.commands.rule_in_force import deciding_bind, deciding_destination
from graft.datapath.decisions import Decisions, Event
from graft.datapath.layout import TracedCall, TracedOutcome
from graft.errors import NotFoundError, UsageError
from graft.model.address import SocketAddress
from graft.model.endpoint import PROTOCOL_LABELS, Endpoint
from graft.state.installation import Installation
from graft.state.records import Container

POLL_SECONDS = 0.05
_LOOK_AGAIN_SECONDS = 1.0
_GONE = 256  # of which the names are kept
NamedT = TypeVar("NamedT")
_PROTOCOLS = {
    **PROTOCOL_LABELS,
    socket.IPPROTO_ICMPV6: "icmp",
    0: "",
}  # (of MPTCP an event has one byte: TCP)
_IN_WORDS = {
    TracedOutcome.RELAYED: "relayed by graftd",
    TracedOutcome.CONTAINER: "left to the container's own stack",
    TracedOutcome.PASSED: "passed by the policy's default, on the host's stack",
}


@dataclass(frozen=True, slots=True)
class Filter:
    """Which decisions are of interest. Empty: all."""

    container: int = 0
    calls: frozenset[TracedCall] = frozenset()
    outcomes: frozenset[TracedOutcome] = frozenset()
    endpoint: str = ""

    def may_want(self, event: Event) -> bool:
        """Whether this one may be, by what needs no names: to find those takes time."""
        return (
            (not self.container or event.container == self.container)
            and (not self.calls or event.call in self.calls)
            and (not self.outcomes or event.outcome in self.outcomes)
        )

    def wants(self, traced: Traced) -> bool:
        """Whether it is, if it may be."""
        return not self.endpoint or (traced.endpoint is not None and traced.endpoint.name == self.endpoint)


@dataclass(frozen=True, slots=True)
class Traced:
    """A decision with its names. ``at`` is the time of day; ``process`` is NAME[PID], or empty where nobody knows."""

    event: Event
    at: datetime
    container: str
    process: str
    endpoint: Endpoint | None
    rule: ActiveRule | None

    @property
    def protocol(self) -> str:
        """tcp, udp, icmp, a number, or nothing."""
        return _PROTOCOLS.get(self.event.protocol, str(self.event.protocol))

    @property
    def asked(self) -> str:
        """What the call asked for, as text."""
        event = self.event
        if event.call is TracedCall.OPTION:
            return f"level {event.level} option {event.option}"
        if event.call is TracedCall.SOCKET:
            return f"protocol {event.protocol}"
        return "" if event.ip is None else str(SocketAddress(event.ip, event.port))

    @property
    def result(self) -> str:
        """What became of it, as text."""
        event = self.event
        if event.outcome is TracedOutcome.REFUSED:
            return "dropped" if event.call is TracedCall.PACKET else "refused"
        if event.outcome is not TracedOutcome.GRANTED:
            return _IN_WORDS[event.outcome]
        if self.endpoint is None:
            return "a deleted endpoint (host)"
        if event.call is TracedCall.BIND and event.endpoint_port:
            where = str(SocketAddress(self.endpoint.address, event.endpoint_port))
        else:
            where = self.endpoint.format().removeprefix(f"{self.endpoint.name} = ")
        sign = "->" if event.call in (TracedCall.BIND, TracedCall.LISTEN) else "from"
        return f"{sign} {self.endpoint.name} {where} (host)"

    def __str__(self) -> str:
        """`text`, with the time before it."""
        return f"{self.at:%H:%M:%S.%f} {self.text}"

    @property
    def text(self) -> str:
        """nginx[812] bind tcp 0.0.0.0:80 -> nx4 0.0.0.0:8080 (host), with the container before it."""
        words = [
            self.container,
            self.process,
            self.event.call.name.lower(),
            self.protocol if self.asked and self.event.ip is not None else "",
            self.asked,
            self.result if self.result.startswith(("->", "from")) else f"-> {self.result}",
            f"by {self.rule}" if self.rule is not None and self.event.outcome is TracedOutcome.REFUSED else "",
        ]
        return " ".join(word for word in words if word)

    @property
    def record(self) -> dict[str, Any]:
        """The same for programs."""
        event = self.event
        return {
            "time": self.at.astimezone().isoformat(),
            "container": self.container,
            "container_id": event.container,
            "pid": event.pid or None,
            "tid": event.tid or None,
            "process": event.comm or None,
            "call": event.call.name.lower(),
            "protocol": self.protocol or None,
            "address": None if event.ip is None else str(event.ip),
            "port": None if event.ip is None else event.port,
            "outcome": event.outcome.name.lower(),
            "endpoint": None if self.endpoint is None else self.endpoint.name,
            "endpoint_port": event.endpoint_port or None,
            "rule": None if self.rule is None else str(self.rule),
            "level": event.level or None,
            "option": event.option or None,
        }


def journal_fields(record: Mapping[str, Any]) -> dict[str, str]:
    """A decision's record as fields of systemd's journal: GRAFT_CONTAINER, GRAFT_CALL, GRAFT_OUTCOME... Pure."""
    named = {name: value for name, value in record.items() if value is not None and name != "time"}
    return {f"GRAFT_{name.upper()}": str(value) for name, value in named.items()}


def parse_calls(names: Sequence[str]) -> frozenset[TracedCall]:
    """Calls by their names. Raises UsageError."""
    return frozenset(_member(TracedCall, name, "--call") for name in names)


def parse_outcomes(names: Sequence[str]) -> frozenset[TracedOutcome]:
    """Outcomes by their names. Raises UsageError."""
    return frozenset(_member(TracedOutcome, name, "--verdict") for name in names)


def _member(kind: Any, name: str, field: str) -> Any:
    try:
        return kind[name.upper()]
    except KeyError:
        known = ", ".join(one.name.lower() for one in kind)
        raise UsageError(f"{field}: no such value: {name!r}", f"one of {known}") from None


def _newest(before: Mapping[int, NamedT], now: Mapping[int, NamedT]) -> dict[int, NamedT]:
    """Those of now, and some that are gone: decisions about them may still be read."""
    gone = [(number, one) for number, one in before.items() if number not in now]
    return {**dict(gone[-_GONE:]), **now}


@dataclass(slots=True)
class _Names:
    """What numbers are called, looked up at most once a second."""

    graft: Installation
    _looked: float = field(default=-_LOOK_AGAIN_SECONDS)
    _containers: dict[int, Container] = field(default_factory=dict)
    _endpoints: dict[int, Endpoint] = field(default_factory=dict)
    _rules: dict[int, tuple[ActiveRule, ...]] = field(default_factory=dict)

    def _refresh(self) -> None:
        if time.monotonic() - self._looked < _LOOK_AGAIN_SECONDS:
            return
        self._looked = time.monotonic()
        self._containers = _newest(self._containers, {one.id: one for one in self.graft.containers.listing()})
        self._endpoints = _newest(self._endpoints, self.graft.endpoints.by_id())
        self._rules.clear()

    def container(self, number: int) -> Container | None:
        self._refresh()
        return self._containers.get(number)

    def endpoint(self, number: int) -> Endpoint | None:
        self._refresh()
        return self._endpoints.get(number)

    def rules(self, container: Container) -> tuple[ActiveRule, ...]:
        self._refresh()
        if container.id not in self._rules:
            try:
                self._rules[container.id] = policy_in_force(self.graft, container).rules
            except NotFoundError:
                self._rules[container.id] = ()
        return self._rules[container.id]


def _process(event: Event) -> str:
    """NAME[PID], as far as the hook knew them."""
    if event.comm:
        return f"{event.comm}[{event.pid}]"
    return f"?[{event.tid}]" if event.tid else ""


def _deciding(names: _Names, container: Container | None, event: Event) -> ActiveRule | None:
    if container is None or event.ip is None:
        return None
    protocol = _PROTOCOLS.get(event.protocol, "")
    if event.call in (TracedCall.BIND, TracedCall.LISTEN):
        return deciding_bind(names.rules(container), protocol, event.ip, event.port)
    if event.call in (TracedCall.CONNECT, TracedCall.SEND):
        return deciding_destination(names.rules(container), protocol, event.ip, event.port)
    return None


@dataclass(frozen=True, slots=True)
class Batch:
    """What has come since the last one: decisions, and how many were lost. ``has_gap``: for a time nobody had decisions
    written, because what came before took this process too long.
    """

    decisions: tuple[Traced, ...]
    lost: int
    has_gap: bool = False


def watch(graft: Installation, wanted: Filter) -> Generator[Batch]:
    """The decisions from now on, for ever; a batch, which may be empty, every `POLL_SECONDS`.

    The first one, an empty one, comes when decisions are being watched. After Ctrl-C there is one more, and then the
    exception; who is interrupted between two batches throws it here for that. Raises NotUpError, KernelError.
    """
    names = _Names(graft)
    decisions = Decisions(graft.maps)
    behind = time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    unnamed: deque[Event] = deque()
    found: list[Traced] = []  # both outlive an interrupt: what was read is in no ring any more

    def batch() -> Batch:
        has_gap = decisions.renew()
        events, lost = decisions.read()
        unnamed.extend(event for event in events if wanted.may_want(event))
        while unnamed:
            traced = _named(names, unnamed[0], behind)
            decisions.renew()
            if wanted.wants(traced):
                found.append(traced)
            unnamed.popleft()
        complete = Batch(tuple(found), lost, has_gap)
        found.clear()
        return complete

    try:
        while True:
            yield batch()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        yield batch()  # what came before it
        raise
    finally:
        decisions.close()


def _named(names: _Names, event: Event, behind: int) -> Traced:
    container = names.container(event.container)
    return Traced(
        event,
        datetime.fromtimestamp((event.time + behind) / 1e9),
        str(event.container) if container is None else container.name,
        _process(event),
        names.endpoint(event.endpoint) if event.endpoint else None,
        _deciding(names, container, event),
    )
