"""Finds what no policy that was in force grants. Pure.

Each rule of the judge's is a function from what was seen to findings. The policies that count are those of the time at
which a thing was decided: of a call from its begin to its end, of a packet from the begin of the call that sent it.

    packets     leave for destinations and from sources that a rule grants; no options, no other protocols
    answers     to a SYN come from listeners that began to listen while a rule granted their endpoint
    ports       that the kernel does not choose are those of an endpoint, and of the one that the bind asked for
    datagrams   of a stranger reach only sockets that were bound to an endpoint
    groups      on the host's links are not joined
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from tests.fuzz import rules
from tests.fuzz.model import World
from tests.fuzz.seen import ICMP, ICMP6, IGMP, TCP, UDP, Event, Observed, Packet, Stand

SLACK = {"swap": 200_000_000, "born": 200_000_000, "direct": 200_000_000, "splice": 1_500_000_000}
"""How long a packet may have been under way where no call was being made: timers; in splice graftd, which looks about
five times a second.
"""
OWN_PORTS = range(61000, 65536)
"""Ports of the judge's own sockets."""
NAMES = {TCP: "tcp", UDP: "udp"}
ECHOES = {ICMP: 8, ICMP6: 128}


@dataclass(frozen=True, slots=True)
class Finding:
    """What no policy grants: which rule of the judge's says so, of what."""

    rule: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.what}"


def judge(seen: Observed) -> list[Finding]:
    """Everything that no policy grants."""
    found = chain(packets(seen), answers(seen), ports(seen), datagrams(seen), groups(seen))
    return list(dict.fromkeys(found))


def _direct(seen: Observed) -> bool:
    return seen.transport == "direct"


def _since_begin(seen: Observed, until: int) -> list[World]:
    return list(seen.timeline.during(seen.begun, until))


def _calls_at(seen: Observed, time: int) -> list[Event]:
    return [one for one in seen.events if one.begin <= time <= one.end]


def _when_sent(seen: Observed, time: int) -> list[World]:
    """The worlds that can have let a packet out."""
    begin = min((one.begin for one in _calls_at(seen, time)), default=time - SLACK[seen.transport])
    if seen.transport == "splice":
        begin = min(begin, time - SLACK["splice"])
    return list(seen.timeline.during(begin, time))


def _during_calls(seen: Observed, calls: list[Event]) -> list[World]:
    return [world for one in calls for world in seen.timeline.during(one.begin, one.end)]


# ---- packets


def packets(seen: Observed) -> Iterator[Finding]:
    """Where they go, where they come from, what they are."""
    connections: set[tuple[tuple[str, int], tuple[str, int], int]] = set()
    for packet in seen.packets:
        connection = packet.source, packet.to, packet.number
        is_first = connection not in connections
        connections.add(connection)
        if packet.time < seen.since or packet.source[1] in OWN_PORTS or packet.protocol == IGMP:
            continue
        if packet.protocol not in NAMES:
            yield from _of_other_protocol(seen, packet)
            continue
        yield from _with_options(seen, packet)
        if packet.protocol == UDP or (packet.opens and is_first):
            yield from _destination(seen, packet)


def _show(packet: Packet) -> str:
    name = NAMES.get(packet.protocol, f"protocol {packet.protocol}")
    return f"{name} from {packet.source[0]} {packet.source[1]} to {packet.to[0]} {packet.to[1]}"


def _of_other_protocol(seen: Observed, packet: Packet) -> Iterator[Finding]:
    if packet.protocol in ECHOES and packet.flags != ECHOES[packet.protocol]:
        return
    if not any(rules.leaves_others(one, _direct(seen)) for one in _since_begin(seen, packet.time)):
        yield Finding("packets", f"no rule can speak of it: {_show(packet)}")


def _with_options(seen: Observed, packet: Packet) -> Iterator[Finding]:
    if packet.odd and not any(rules.is_free(one, _direct(seen)) for one in _when_sent(seen, packet.time)):
        yield Finding("packets", f"options or extension headers: {_show(packet)}")


def _connected_before(seen: Observed, packet: Packet) -> list[Event]:
    """Calls that were let through before and named this destination: a connection may begin later than its connect."""
    loopback = packet.to[0] in ("127.0.0.1", "::1") or packet.to[0] == packet.source[0]
    return [
        one
        for one in seen.events
        if packet.protocol == TCP
        and one.begin <= packet.time
        and one.went
        and one.asked[1] == packet.to[1]
        and (one.asked[0] == packet.to[0] or (loopback and rules.is_any(one.asked[0])))
    ]


def _destination(seen: Observed, packet: Packet) -> Iterator[Finding]:
    name, direct = NAMES[packet.protocol], _direct(seen)
    worlds = _when_sent(seen, packet.time) + _during_calls(seen, _connected_before(seen, packet))
    if not any(rules.may_reach(one, direct, name, *packet.to) for one in worlds):
        yield Finding("packets", f"no policy grants that destination: {_show(packet)}")
        return
    ever = _since_begin(seen, packet.time)
    if packet.source[0] not in seen.addresses and not any(rules.is_free(one, direct) for one in ever):
        yield Finding("packets", f"not an address of the host's: {_show(packet)}")
    # Port 0: another thread disconnected the socket during the send() (docs/security.md). Nothing is at that port.
    elif packet.source[1] and not any(
        rules.may_hold(one, direct, name, *packet.source)
        or (
            rules.may_reach(one, direct, name, *packet.to)
            and rules.may_leave_from(one, direct, name, packet.source, packet.to)
        )
        for one in ever
    ):
        yield Finding("packets", f"no policy grants that source: {_show(packet)}")


# ---- answers


def _resets(event: Event) -> bool:
    """Whether the call ends a listener."""
    return event.op == "unspec" or (event.op == "shutdown" and event.words[2] in ("0", "2"))


def _listens(seen: Observed, cookie: int) -> list[Event] | None:
    """The calls that can have made a listener of this socket. None: it is not known."""
    own = [one for one in seen.events if one.cookie == cookie and one.result >= 0]
    reset = max((one.begin for one in own if _resets(one)), default=0)
    return [one for one in own if one.op == "listen" and one.end >= reset] or None


def _is_at(stand: Stand, address: str, port: int) -> bool:
    own = stand.own[0]
    return stand.own[1] == port and (own in ("::", address) or (own == "0.0.0.0" and ":" not in address))


def _when_listened(seen: Observed, packet: Packet) -> list[World]:
    """The worlds in which a listener may have begun to listen at the address of this answer."""
    found = [one for one in seen.sockets if one.protocol == TCP and one.listens and _is_at(one, *packet.source)]
    known = [_listens(seen, one.cookie) for one in found]
    if not known or None in known:
        return _since_begin(seen, packet.time)
    return _during_calls(seen, [event for events in known for event in events or ()])


def answers(seen: Observed) -> Iterator[Finding]:
    """Who answers a SYN. (Two ends that open one connection at once answer each other.)"""
    opened = {(one.source, one.to) for one in seen.packets if one.opens}
    for packet in seen.packets:
        if not packet.answers or packet.time < seen.since or (packet.source, packet.to) in opened:
            continue
        worlds = _when_listened(seen, packet)
        if not any(rules.may_hold(one, _direct(seen), "tcp", *packet.source) for one in worlds):
            yield Finding("answers", f"a listener answers at {packet.source[0]} {packet.source[1]}, by {packet.to[0]}")


# ---- ports


def _last_bind(seen: Observed, stand: Stand) -> Event | None:
    """The bind that gave a socket its address; None where another call may have."""
    own = [one for one in seen.events if one.cookie == stand.cookie]
    binds = [one for one in own if one.op == "bind" and one.result >= 0]
    others = any(one.op in ("connect", "unspec", "send", "cmsg", "accept") for one in own)
    return None if others or len(binds) != 1 else binds[0]


def ports(seen: Observed) -> Iterator[Finding]:
    """What the container's sockets stand at."""
    direct, ever = _direct(seen), _since_begin(seen, seen.ended)
    for stand in seen.sockets:
        name = NAMES.get(stand.protocol)
        if name is None or not stand.own[1]:
            continue
        text = f"{name} socket at {stand.own[0]} {stand.own[1]}"
        by_kernel = stand.own[1] in rules.KERNELS_CHOICE and not (seen.transport == "splice" and stand.listens)
        if not by_kernel and not any(rules.may_come_from(one, direct, name, *stand.own) for one in ever):
            yield Finding("ports", f"no policy grants it: {text}")
            continue
        bind = _last_bind(seen, stand)
        if bind is not None and bind.netns == seen.host and not _bind_says(seen, stand, name, bind):
            yield Finding("ports", f"no rule makes that of a bind to {bind.asked[0]} {bind.asked[1]}: {text}")


def _bind_says(seen: Observed, stand: Stand, name: str, bind: Event) -> bool:
    return any(
        rules.binds_freely(world, _direct(seen))
        or (seen.transport == "swap" and rules.may_have_any_port(world, name, bind.asked, stand.own))
        or any(
            rules.stands_at(endpoint, *stand.own) and (endpoint.address == stand.own[0] or endpoint.dual_stack)
            for endpoint in rules.bind_outcomes(world, name, *bind.asked)
        )
        for world in seen.timeline.during(bind.begin, bind.end)
    )


# ---- datagrams, groups


def datagrams(seen: Observed) -> Iterator[Finding]:
    """Who got what the judge sent as a stranger."""
    direct = _direct(seen)
    for one in seen.received:
        own = [event for event in seen.events if event.cookie == one.cookie]
        binds = [event for event in own if event.op == "bind" and event.result >= 0]
        bound = _during_calls(seen, binds) if own else _since_begin(seen, one.time)
        now = list(seen.timeline.during(one.time - SLACK[seen.transport], one.time))
        if any(rules.may_hold(world, direct, "udp", *one.to) for world in bound):
            continue
        if any(
            rules.may_reach(world, direct, "udp", *one.source) or rules.binds_freely(world, direct) for world in now
        ):
            continue
        yield Finding("datagrams", f"a stranger's ({one.source[0]} {one.source[1]}) was got at {one.to[0]} {one.to[1]}")


def groups(seen: Observed) -> Iterator[Finding]:
    """Memberships on the host's links."""
    if not any(rules.is_free(one, _direct(seen)) for one in _since_begin(seen, seen.ended)):
        yield from (Finding("groups", f"joined {one}") for one in seen.groups)
