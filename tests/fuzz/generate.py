"""A sequence out of a seed: the same seed and transport give the same sequence. Pure.

Calls come in short stories (a listener, a connection that is disconnected and used again, a datagram), because wholly
random calls hardly ever get past the first. Random are every value, the calls that are left out or put between, the
process that makes a call, and the way it makes it.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import replace

from tests.fuzz.model import Change, Egress, Endpoint, Ingress, Phase, Policy, Sequence, Transport, World
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6

OTHER4, OTHER6 = "10.98.0.78", "fd98::78"
"""Addresses of the host's that no endpoint names."""
SERVED = (9001, 9002)
"""Ports of the far end that answer."""
FOREIGN = (25101, 25102, 25103)
"""Ports of endpoints that belong to other containers."""
ASKED = (80, 8001, 8002, 8003)
"""Ports that rules are about."""
SLOTS, THREADS = 6, 3

ENDPOINTS = (
    Endpoint("w1", "0.0.0.0", 25001),
    Endpoint("w2", HOST4, 25002, "tcp"),
    Endpoint("w3", "127.0.0.1", 25003),
    Endpoint("w6", "::", 25006),
    Endpoint("d6", "::", 25007, "any", True),
    Endpoint("u1", "0.0.0.0", 25008, "udp"),
    Endpoint("r4", "0.0.0.0", 25024, last=25026),
    Endpoint("y4", "0.0.0.0", 0),
    Endpoint("o4", "0.0.0.0", 0),
    Endpoint("a4", HOST4, 0),
    Endpoint("f4", HOST4, 25010),
    Endpoint("o6", "::", 0),
    Endpoint("a6", HOST6, 0),
)
THEIRS = tuple(Endpoint(f"x{number}", "0.0.0.0", port) for number, port in enumerate(FOREIGN))
DENIES: dict[Transport, tuple[float, float]] = {
    "swap": (0.5, 0.6),
    "born": (1, 1),
    "direct": (0.6, 0.6),
    "splice": (0.1, 0.6),
}
"""How often binds, and connects, that no rule names are denied. A born container's policy leaves nothing inside."""
SERVERS = ("w1", "w2", "w3", "w6", "d6", "u1", "r4", "y4")
SOURCES = {4: ("o4", "a4", "f4", "r4"), 6: ("o6", "a6")}
NEAR = {4: ("0.0.0.0", "127.0.0.1", HOST4), 6: ("::", "::1", HOST6, "::ffff:0.0.0.0", f"::ffff:{HOST4}")}
FAR = {
    4: (CLIENT4, CLIENT4, CLIENT4, HOST4, OTHER4, "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.98.0.255", "224.0.0.251"),
    6: (CLIENT6, CLIENT6, HOST6, "::1", "::", "fe80::1%eth0", "ff02::1%eth0", f"::ffff:{CLIENT4}", "::ffff:127.0.0.1"),
}
PREFIXES = {
    4: (f"{CLIENT4}/32", "10.98.0.0/24", "0.0.0.0/0", "127.0.0.0/8", "127.0.0.1/32", f"{HOST4}/32", "224.0.0.0/4"),
    6: (f"{CLIENT6}/128", "fd98::/64", "::/0", "::1/128", f"{HOST6}/128", "fe80::/10", "ff00::/8"),
}
INET, INET6, STREAM, DGRAM, RAW = 2, 10, 1, 2, 3


def _hex(*numbers: int) -> str:
    return struct.pack(f"={len(numbers)}i", *numbers).hex()


OPTIONS: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (1, 2, (_hex(1),)),  # SO_REUSEADDR
    (1, 15, (_hex(1),)),  # SO_REUSEPORT
    (1, 6, (_hex(1),)),  # SO_BROADCAST
    (1, 13, (_hex(1, 0),)),  # SO_LINGER: a reset at close
    (1, 25, (b"lo\0".hex(), b"eth0\0".hex(), "00")),  # SO_BINDTODEVICE
    (1, 62, (_hex(1), _hex(2), _hex(0))),  # SO_BINDTOIFINDEX
    (1, 36, (_hex(7),)),  # SO_MARK
    (0, 4, ("0707040000000000", "830b0401020304010203040100", "")),  # IP_OPTIONS
    (0, 8, (_hex(1),)),  # IP_PKTINFO
    (0, 15, (_hex(1),)),  # IP_FREEBIND
    (0, 19, (_hex(1),)),  # IP_TRANSPARENT
    (0, 24, (_hex(1),)),  # IP_BIND_ADDRESS_NO_PORT
    (0, 32, (bytes([10, 98, 0, 1]).hex(),)),  # IP_MULTICAST_IF
    (0, 35, (bytes([224, 0, 0, 251, 0, 0, 0, 0]).hex(), bytes([224, 0, 0, 251, 10, 98, 0, 1]).hex())),  # membership
    (0, 50, (_hex(1 << 24),)),  # IP_UNICAST_IF
    (0, 51, (struct.pack("=HH", 25001, 25110).hex(), struct.pack("=HH", 40000, 40001).hex())),  # local port range
    (41, 1, (_hex(INET),)),  # IPV6_ADDRFORM
    (41, 17, (_hex(2),)),  # IPV6_MULTICAST_IF
    (41, 20, ("ff0200000000000000000000000000fb" + _hex(2),)),  # IPV6_JOIN_GROUP
    (41, 26, (_hex(0), _hex(1))),  # IPV6_V6ONLY
    (41, 27, ("fd980000000000000000000000000099" + _hex(2),)),  # IPV6_JOIN_ANYCAST
    (41, 50, ("fd980000000000000000000000000078" + _hex(0),)),  # IPV6_PKTINFO
    (41, 54, ("0000010400000000",)),  # IPV6_HOPOPTS
    (41, 57, ("0002020100000000fd980000000000000000000000000002",)),  # IPV6_RTHDR
    (41, 59, ("0000010400000000",)),  # IPV6_DSTOPTS
    (41, 78, (_hex(1),)),  # IPV6_FREEBIND
    (6, 9, (_hex(1),)),  # TCP_DEFER_ACCEPT
    (6, 23, (_hex(5),)),  # TCP_FASTOPEN
    (6, 30, (_hex(1),)),  # TCP_FASTOPEN_CONNECT
    (6, 31, (b"mptcp".hex(), b"tls".hex())),  # TCP_ULP
    (6, 34, (_hex(1),)),  # TCP_FASTOPEN_NO_COOKIE
    (6, 19, (_hex(1),)),  # TCP_REPAIR
    (17, 1, (_hex(1), _hex(0))),  # UDP_CORK
    (17, 103, (_hex(2),)),  # UDP_SEGMENT
)
CMSGS = (
    (0, 8, struct.pack("=i4s4s", 0, bytes([10, 98, 0, 78]), bytes(4)).hex()),  # IP_PKTINFO: another source
    (0, 8, struct.pack("=i4s4s", 2, bytes(4), bytes(4)).hex()),  # another interface
    (0, 7, "0707040000000000"),  # IP_RETOPTS: options
    (41, 50, "fd980000000000000000000000000078" + _hex(0)),  # IPV6_PKTINFO
    (41, 54, "0000010400000000"),
    (41, 57, "0002020100000000fd980000000000000000000000000002"),
    (41, 59, "0000010400000000"),
    (17, 103, "0200"),
    (1, 36, _hex(7)),
)
KINDS = (
    [(INET, STREAM, 0)] * 8
    + [(INET6, STREAM, 0)] * 6
    + [(INET, DGRAM, 0)] * 5
    + [(INET6, DGRAM, 0)] * 4
    + [(INET, STREAM, 262), (INET6, STREAM, 262), (INET, DGRAM, 136), (INET6, DGRAM, 136), (INET, DGRAM, 1)]
    + [
        (INET6, DGRAM, 58),
        (INET, STREAM, 132),
        (INET, RAW, 1),
        (INET, RAW, 255),
        (1, STREAM, 0),
        (16, RAW, 4),
        (17, 3, 3),
    ]
)


class Generator:
    """Makes one sequence; its numbers come from one seed."""

    def __init__(self, seed: int, transport: Transport) -> None:
        self._chance = random.Random(f"{seed} {transport}")
        self._seed, self._transport = seed, transport
        self._policy = Policy()
        self._later: list[str] = []

    def sequence(self) -> Sequence:
        """The whole of it."""
        world = World((*ENDPOINTS, *THEIRS), self.policy())
        self._policy = world.policy
        phases, now = [], world
        for number in range(self._chance.randint(1, 4)):
            before = self.changes(now, 0 if number == 0 else 2)
            now = after(now, before)
            self._policy = self._chance.choice((now.policy, self._policy))
            meanwhile = self.changes(now, 1)
            now = after(now, meanwhile)
            phases.append(Phase(before, self.calls(), meanwhile))
        return Sequence(self._seed, self._transport, world, tuple(phases))

    # ---- the operator

    def policy(self) -> Policy:
        """Rules that do not contradict each other: each address and prefix once."""
        chance = self._chance
        binds = [("*", 4), ("*", 6), ("0.0.0.0", 4), ("::", 6), (HOST4, 4), ("127.0.0.1", 4)]
        ingress = [self._ingress(*one) for one in chance.sample(binds, chance.randint(0, 5))]
        egress = [
            self._egress(family, to)
            for family in (4, 6)
            for to in chance.sample(PREFIXES[family], chance.randint(0, 3))
        ]
        bind, connect = DENIES[self._transport]
        return Policy(
            tuple(ingress),
            tuple(egress),
            "deny" if chance.random() < bind else "container",
            "deny" if chance.random() < connect else "container",
            chance.choice(("", "", "", "deny", "container")) if self._transport == "direct" else "",
        )

    def _ingress(self, address: str, family: int) -> Ingress:
        first = self._chance.choice(ASKED)
        last = first + self._chance.choice((0, 0, 2))
        names = [name for name in SERVERS if (6 if name in ("w6", "d6") else 4) == family]
        if self._transport == "born":
            names = [name for name in names if name != "w6"]
        name = self._chance.choice(names)
        if name == "y4" and self._transport != "splice" and self._chance.random() < 0.5:
            first = last = 0
        if name == "r4":
            last = first + 2
        return Ingress(address, first, last, name)

    def _egress(self, family: int, to: str) -> Egress:
        chance = self._chance
        ports = chance.choice(((), (), (SERVED[0],), SERVED))
        outcome = chance.choice((*SOURCES[family] * 2, "deny", *(["container"] if self._transport != "born" else [])))
        return Egress(to, ports, outcome, chance.choice(("any", "any", "tcp", "udp")))

    def changes(self, world: World, most: int) -> tuple[Change, ...]:
        """What the operator does, to a world that is so."""
        made: list[Change] = []
        for _ in range(self._chance.randint(0, most)):
            made += self._change(after(world, made))
        return tuple(made)

    def _change(self, world: World) -> list[Change]:
        chance = self._chance
        kind = chance.choice(("apply", "apply", "apply", "move", "delete"))
        mine = [one for one in world.endpoints if one.name[0] != "x"]
        missing = [Change("add", endpoint=one) for one in ENDPOINTS if world.endpoint(one.name) is None]
        if kind == "apply" or not mine:
            return [*missing, Change("apply", policy=self.policy())]
        chosen = chance.choice(mine)
        if kind == "delete":
            return [Change("delete", name=chosen.name)]
        return [
            Change(
                "move",
                endpoint=replace(chosen, port=chosen.port and chosen.port ^ 32, last=chosen.last and chosen.last ^ 32),
            )
        ]

    # ---- the program

    def calls(self) -> tuple[str, ...]:
        """A few stories, each of one thread and on one slot more or less."""
        stories: Several[Callable[[int], list[str]]] = (
            self._listener,
            self._listener,
            self._taken_again,
            self._connection,
            self._connection,
            self._datagrams,
            self._datagrams,
            self._anything,
        )
        made, self._later = self._later, []
        for _ in range(self._chance.randint(2, 5)):
            thread = self._chance.randrange(THREADS)
            steps = self._chance.choice(stories)(self._chance.randrange(SLOTS))
            steps = [self._made_by(thread, step) for step in steps if self._chance.random() > 0.07]
            here = self._ends_at(steps)
            made += steps[:here]
            self._later += steps[here:]
        return tuple(made)

    def _ends_at(self, steps: list[str]) -> int:
        """How much of a story belongs to this phase: now and then the rest comes when the policy has changed."""
        if self._chance.random() < 0.6:
            return len(steps)
        return self._chance.randint(1, len(steps)) if steps else 0

    def _made_by(self, thread: int, step: str) -> str:
        chance, op = self._chance, step.split()[0]
        by = "self"
        if (
            op in ("bind", "connect", "listen", "unspec", "shutdown", "option", "send", "cmsg")
            and chance.random() < 0.1
        ):
            by = chance.choice(("fork", "lent"))
        ways = ("plain", "plain", "plain", "plain", "int80", "uring")
        way = chance.choice(ways) if op in ("bind", "connect", "listen") else "plain"
        return f"{thread} {by} {way} {step}"

    def _socket(self, slot: int, kind: int | None = None) -> tuple[list[str], int]:
        """A socket with options, of that type; and its family, as 4 or 6."""
        family, its_type, protocol = self._chance.choice([one for one in KINDS if kind in (None, one[1])])
        steps = [f"socket {slot} {family} {its_type} {protocol}"]
        steps += [self._option(slot) for _ in range(self._chance.choice((0, 0, 1, 1, 2)))]
        return steps, 6 if family == INET6 else 4

    def _option(self, slot: int) -> str:
        chance = self._chance
        if chance.random() < 0.15:
            level = chance.choice((0, 1, 6, 17, 41, 132, 136, 255, 284))
            name = chance.choice([one for one in range(1, 85) if (level, one) != (1, 13)])
            return f"option {slot} {level} {name} {chance.randbytes(chance.choice((1, 4, 4, 8, 16))).hex()}"
        level, name, values = chance.choice(OPTIONS)
        return f"option {slot} {level} {name} {chance.choice(values)}".rstrip()

    def _bind(self, slot: int, family: int) -> str:
        chance = self._chance
        named = [one for one in self._policy.ingress if one.address == "*" or (":" in one.address) == (family == 6)]
        if named and chance.random() < 0.6:
            rule = chance.choice(named)
            port = chance.randint(rule.first, rule.last)
            return f"bind {slot} {NEAR[family][0] if rule.address == '*' else rule.address} {port}"
        port = chance.choice((*ASKED * 4, 0, 0, *FOREIGN, 25001, 25002, 25010, 25024, 25025, 40000, 8004))
        address = chance.choice((*(NEAR[family][0],) * 4, *NEAR[family], OTHER6 if family == 6 else OTHER4))
        return f"bind {slot} {address} {port}"

    def _to(self, family: int) -> str:
        granted = [one for one in self._policy.egress if one.outcome in SOURCES[family]]
        if granted and self._chance.random() < 0.4:
            port = (*self._chance.choice(granted).ports, *SERVED)[0]
            return f"{CLIENT6 if family == 6 else CLIENT4} {port}"
        port = self._chance.choice((*SERVED * 3, *FOREIGN, 25001, 25002, 9003))
        return f"{self._chance.choice(FAR[family])} {port}"

    def _send(self, slot: int, family: int) -> str:
        chance = self._chance
        to = chance.choice((self._to(family), self._to(family), "- 0"))
        flags = chance.choice((0, 0, 0, 0x8000, 0x4, 0x20000000))  # MSG_MORE, MSG_DONTROUTE, MSG_FASTOPEN
        if chance.random() < 0.4:
            return "cmsg {} {} {} {} {} {}".format(slot, to, flags, *chance.choice(CMSGS))
        return f"send {slot} {to} {flags}"

    def _noise(self, slot: int, family: int) -> list[str]:
        chance, other = self._chance, self._chance.randrange(SLOTS)
        return chance.choice(
            (
                [],
                [],
                [f"nap 0 {chance.randint(1, 15)}"],
                [self._option(slot)],
                [f"dup {slot} {other}"],
                [f"pass {slot} {other}"],
                [f"shutdown {slot} {chance.randint(0, 2)}"],
                [f"unspec {slot}"],
                [self._bind(slot, family)],
            )
        )

    def _listener(self, slot: int) -> list[str]:
        steps, family = self._socket(slot, STREAM)
        between = self._noise(slot, family)
        return [*steps, self._bind(slot, family), *between, f"listen {slot} 8", *self._noise(slot, family)]

    def _taken_again(self, slot: int) -> list[str]:
        """A connection that was accepted, or made, is disconnected, and listens or connects again."""
        steps, family = self._socket(slot, STREAM)
        begin = [*steps, self._bind(slot, family), f"listen {slot} 8"]
        if self._chance.random() < 0.4:
            other = self._chance.randrange(SLOTS)
            near = "::1" if family == 6 else self._chance.choice((HOST4, "127.0.0.1"))
            port = self._chance.choice((25001, 25002, 25003, 25006, 25007, *ASKED))
            begin += [
                f"socket {other} {INET6 if family == 6 else INET} 1 0",
                f"connect {other} {near} {port}",
                "nap 0 2",
            ]
        begin += [f"accept {slot} {slot}"]
        again = [f"listen {slot} 8"] if self._chance.random() < 0.6 else [f"connect {slot} {self._to(family)}"]
        end = self._chance.choice(
            ([f"unspec {slot}"], [f"unspec {slot}"], [f"shutdown {slot} 2"], [f"shutdown {slot} 2", f"unspec {slot}"])
        )
        return [*begin, *end, *self._noise(slot, family), *again]

    def _connection(self, slot: int) -> list[str]:
        steps, family = self._socket(slot, STREAM)
        first = [self._bind(slot, family)] if self._chance.random() < 0.3 else []
        then = [self._send(slot, family)] if self._chance.random() < 0.4 else [f"connect {slot} {self._to(family)}"]
        return [*steps, *first, *then, *self._noise(slot, family), self._send(slot, family), f"receive {slot}"]

    def _datagrams(self, slot: int) -> list[str]:
        steps, family = self._socket(slot, DGRAM)
        first = [self._bind(slot, family)] if self._chance.random() < 0.5 else []
        then = [f"connect {slot} {self._to(family)}"] if self._chance.random() < 0.5 else []
        sends = [step for _ in range(2) for step in (self._send(slot, family), *self._noise(slot, family))]
        return [*steps, *first, *then, *sends, f"receive {slot}"]

    def _anything(self, slot: int) -> list[str]:
        steps, family = self._socket(slot)
        for _ in range(self._chance.randint(1, 6)):
            steps += self._chance.choice(
                (
                    [self._bind(slot, family)],
                    [f"connect {slot} {self._to(family)}"],
                    [self._send(slot, family)],
                    [f"listen {slot} {self._chance.choice((0, 1, 8))}"],
                    [f"close {slot}"],
                    [f"accept {slot} {self._chance.randrange(SLOTS)}"],
                    self._noise(slot, family),
                )
            )
        return steps


def after(world: World, changes: Several[Change]) -> World:
    """The world when all of them were made."""
    for change in changes:
        world = change.of(world)
    return world


def generate(seed: int, transport: Transport) -> Sequence:
    """The sequence of a seed."""
    return Generator(seed, transport).sequence()
