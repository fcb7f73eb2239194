"""One sequence from begin to end, and many of them: calls are made, the kernel is looked at, the judge is asked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address

from tests.fuzz import rules
from tests.fuzz.arena import Arena, addresses, ferry_ports
from tests.fuzz.judge import NAMES, OWN_PORTS, Finding, judge
from tests.fuzz.model import Phase, Sequence
from tests.fuzz.observe import Capture, Diagnostics, Stranger, memberships
from tests.fuzz.seen import UDP, Event, Observed, Packet, Stand, parse_event
from tests.support.wait import PATIENCE

REFUSALS = (-1, -13)
SETTLE = {"swap": 0.0, "born": 0.0, "direct": 0.0, "splice": 0.5}
"""Seconds until the effects of the calls can be seen. graftd looks five times a second."""


@dataclass
class Tally:
    """What was done: a run that saw nothing must not look like one that found nothing."""

    sequences: int = 0
    calls: int = 0
    changes: int = 0
    granted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failed: int = 0

    def add(self, events: list[Event], sockets: tuple[Stand, ...], packets: list[Packet]) -> None:
        """A phase."""
        self.calls += len(events)
        self.refused.update(one.op for one in events if one.result in REFUSALS)
        stood = [one for one in sockets if one.own[1] and one.own[1] not in rules.KERNELS_CHOICE]
        own = [one for one in packets if one.source[1] not in OWN_PORTS]
        self.granted["bind"] += len(stood)
        self.granted["listen"] += sum(one.answers and one.to[1] in OWN_PORTS for one in own)
        self.granted["connect"] += sum(one.opens for one in own)
        self.granted["send"] += sum(one.protocol == UDP for one in own)

    def __str__(self) -> str:
        granted = ", ".join(f"{self.granted[name]} {name}" for name in ("bind", "listen", "connect", "send"))
        refused = ", ".join(f"{count} {name}" for name, count in sorted(self.refused.items()))
        return (
            f"{self.sequences} sequences, {self.calls} calls, {self.changes} policies or endpoints changed, "
            f"{self.failed} failures; granted: {granted}; refused: {refused or 'none'}"
        )


class Runner:
    """Runs sequences in an arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._addresses = addresses(arena.host.netns)
        self._capture = Capture(arena.host.netns)
        self._diagnostics = Diagnostics(arena.host.netns)
        self._stranger = Stranger(arena.host.netns, arena.host.client)
        self._there = {one.cookie for one in self._diagnostics.sockets()}
        self.tally = Tally()

    def close(self) -> None:
        """Done."""
        self._capture.close()
        self._diagnostics.close()

    def run(self, sequence: Sequence) -> list[Finding]:
        """What no policy grants; the phases after the first one with findings are left out."""
        arena, operator = self._arena, self._arena.operator
        operator.become(sequence.world)
        changes, before = operator.changes, memberships(arena.host.netns)
        list(self._capture.packets())
        begun = since = time.time_ns()
        arena.player.say("begin")
        host = self._host_cookie(arena.player.until("ready")[-1])
        events: list[Event] = []
        packets: list[Packet] = []
        found: list[Finding] = []
        for phase in sequence.phases:
            made = self._calls(phase)
            events += made
            seen = self._look((begun, since), host, events, packets, before)
            self.tally.add(made, seen.sockets, packets)
            found = judge(seen)
            if found:
                break
            since = seen.ended
        arena.player.say("end")
        arena.player.until("ended")
        self.tally.sequences += 1
        self.tally.changes += operator.changes - changes
        arena.far.clear()
        return found or self._left()

    def _host_cookie(self, ready: str) -> int:
        return self._arena.host.netns.cookie if self._arena.transport != "direct" else int(ready.split()[1])

    def _calls(self, phase: Phase) -> list[Event]:
        arena = self._arena
        for change in phase.before:
            arena.operator.make(change)
        arena.player.say(*(f"c {call}" for call in phase.calls), "go")
        for change in phase.meanwhile:
            arena.operator.make(change)
        return [parse_event(phase.calls, line) for line in arena.player.until("done") if line.startswith("e ")]

    def _look(
        self, times: tuple[int, int], host: int, events: list[Event], packets: list[Packet], before: frozenset[str]
    ) -> Observed:
        arena = self._arena
        time.sleep(SETTLE[arena.transport])
        sockets = self._sockets()
        self._stranger.knock(sockets)
        self._stranger.send(sockets)
        arena.player.say("drain")
        received = tuple(self._stranger.got(line) for line in arena.player.until("done") if line.startswith("h "))
        ferry = ferry_ports(arena.host)
        packets += (one for one in self._capture.packets() if not _is_carried(one, ferry))
        groups = tuple(sorted(memberships(arena.host.netns) - before))
        return Observed(
            arena.transport,
            host,
            self._addresses,
            arena.operator.timeline,
            *times,
            time.time_ns(),
            tuple(events),
            sockets,
            tuple(packets),
            received,
            groups,
        )

    def _sockets(self) -> tuple[Stand, ...]:
        ferry = ferry_ports(self._arena.host)
        found = (one for one in self._diagnostics.sockets() if one.cookie not in self._there)
        return tuple(one for one in found if one.protocol != UDP or one.own[1] not in ferry)

    def _left(self) -> list[Finding]:
        """Sockets that are still in the host's stack when the program has ended."""
        end = time.monotonic() + 5 * PATIENCE
        while sockets := self._sockets():
            if time.monotonic() > end:
                return [Finding("left", f"{NAMES.get(one.protocol)} at {one.own[0]} {one.own[1]}") for one in sockets]
            time.sleep(0.02)
        return []


def _is_carried(packet: Packet, ferry: frozenset[int]) -> bool:
    """Whether it is a datagram between a socket of the container's and Graft's own process, on the host's loopback."""
    to_ferry = packet.to[1] in ferry and ip_address(packet.to[0]).is_loopback
    from_ferry = packet.source[1] in ferry and ip_address(packet.source[0]).is_loopback
    return packet.protocol == UDP and (to_ferry or from_ferry)


@contextmanager
def runner(arena: Arena) -> Iterator[Runner]:
    """A runner, closed afterwards."""
    made = Runner(arena)
    try:
        yield made
    finally:
        made.close()
