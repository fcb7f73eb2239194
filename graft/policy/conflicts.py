"""Which rules for one address want the same ports in a way that leaves open who gets them.

Of two ranges that are apart, or one inside the other, each port goes to the smaller. Ranges that are equal, or cross,
say nothing: with different endpoints they are rivals. Rules come one by one, and each is held against all before it, in
a time that grows with the logarithm of their number: a policy may have thousands of ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from graft.model.ports import MAX_PORT, PortRange

Rule = TypeVar("Rule")

_LEAVES = MAX_PORT + 1


class Claim(NamedTuple, Generic[Rule]):
    """A rule that makes ``endpoint`` of ``ports``."""

    ports: PortRange
    endpoint: str
    rule: Rule


class _Reach(NamedTuple, Generic[Rule]):
    """How far a claim's range goes from the port that it is filed under: the higher, the farther."""

    how_far: int
    claim: Claim[Rule]


class _Reaches(Generic[Rule]):
    """The farthest reach of each run of ports: a tree over all ports, in which node n has 2n and 2n + 1 below it.

    A node keeps the farthest, and the farthest of another endpoint: so there is one left, whichever endpoint asks.
    """

    def __init__(self) -> None:
        self._nodes: dict[int, tuple[_Reach[Rule], ...]] = {}

    def add(self, port: int, reach: _Reach[Rule]) -> None:
        node = _LEAVES + port
        while node:
            known = self._nodes.get(node, ())
            best = _best_two(known, reach)
            if best == known:
                return  # nor is it anything new to the nodes above, which know what this one does
            self._nodes[node] = best
            node //= 2

    def farthest(self, first: int, last: int, endpoint: str) -> _Reach[Rule] | None:
        """Of the ports ``first`` to ``last``, and of another endpoint than this one."""
        reaches = [reach for node in _covering(first, last) for reach in self._nodes.get(node, ())]
        others = [reach for reach in reaches if reach.claim.endpoint != endpoint]
        return max(others, key=lambda reach: reach.how_far, default=None)


def _best_two(known: tuple[_Reach[Rule], ...], reach: _Reach[Rule]) -> tuple[_Reach[Rule], ...]:
    """The farthest, and the farthest of another endpoint; what was known first where they are equal."""
    first, *more = sorted((*known, reach), key=lambda one: -one.how_far)
    second = [one for one in more if one.claim.endpoint != first.claim.endpoint]
    return (first, *second[:1])


def _covering(first: int, last: int) -> Iterator[int]:
    """The fewest nodes that have just the ports ``first`` to ``last`` below them; none where they run backwards."""
    left, right = _LEAVES + first, _LEAVES + last + 1
    while left < right:
        if left % 2:
            yield left
            left += 1
        if right % 2:
            right -= 1
            yield right
        left //= 2
        right //= 2


class Rivals(Generic[Rule]):
    """The claims on the ports of one address, so far."""

    def __init__(self) -> None:
        self._equal: dict[PortRange, list[Claim[Rule]]] = {}
        self._down_from_last: _Reaches[Rule] = _Reaches()
        self._up_from_first: _Reaches[Rule] = _Reaches()

    def add(self, claim: Claim[Rule]) -> Rule | None:
        """Take ``claim`` in. Gives the rule of an earlier one that is its rival, None where none is."""
        rival = self._find(claim.ports, claim.endpoint)
        equal = self._equal.setdefault(claim.ports, [])
        # Of equal ranges, two of different endpoints say it all: one of them is a rival of whatever comes.
        if len(equal) < 2 and all(one.endpoint != claim.endpoint for one in equal):
            equal.append(claim)
            self._down_from_last.add(claim.ports.last, _Reach(-claim.ports.first, claim))
            self._up_from_first.add(claim.ports.first, _Reach(claim.ports.last, claim))
        return rival

    def _find(self, ports: PortRange, endpoint: str) -> Rule | None:
        for claim in self._equal.get(ports, ()):
            if claim.endpoint != endpoint:
                return claim.rule
        # One that ends inside of it and began before, or one that begins inside of it and ends behind.
        before = self._down_from_last.farthest(ports.first, ports.last - 1, endpoint)
        if before is not None and -before.how_far < ports.first:
            return before.claim.rule
        behind = self._up_from_first.farthest(ports.first + 1, ports.last, endpoint)
        if behind is not None and behind.how_far > ports.last:
            return behind.claim.rule
        return None
