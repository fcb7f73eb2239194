"""Finds ingress rules in conflict: rules for one address that leave open what a port becomes.

Of two port ranges that are disjoint, or one inside the other, each port goes to the smaller range. Ranges that are
equal, or overlap in part, have no smaller one: with different targets they are in conflict. Claims are added one by
one, and each is compared with all earlier ones in a time that grows with the logarithm of their number: a policy may
have thousands of ranges.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

from graft.model.ports import MAX_PORT, PortRange

Rule = TypeVar("Rule")

_LEAVES = MAX_PORT + 1


class PortClaim(NamedTuple, Generic[Rule]):
    """``rule`` redirects ``ports`` to ``target``: an endpoint, and which of its ports."""

    ports: PortRange
    target: Hashable
    rule: Rule


class _Extent(NamedTuple, Generic[Rule]):
    """A claim in a segment tree, with the value by which it is compared: the higher, the farther its range extends."""

    value: int
    claim: PortClaim[Rule]


class _SegmentTree(Generic[Rule]):
    """Claims, each at one port; finds the one of the highest value in a range of ports. Node n is above 2n and 2n + 1.

    A node has the highest of all below it, and the highest of another target than that one's: so it has an answer
    whichever target is left out.
    """

    def __init__(self) -> None:
        self._nodes: dict[int, tuple[_Extent[Rule], ...]] = {}

    def add(self, port: int, extent: _Extent[Rule]) -> None:
        node = _LEAVES + port
        while node:
            known = self._nodes.get(node, ())
            best = _best_two(known, extent)
            if best == known:
                return  # the nodes above have at least what this one has
            self._nodes[node] = best
            node //= 2

    def highest(self, first: int, last: int, excluded: Hashable) -> _Extent[Rule] | None:
        """The highest at the ports ``first`` to ``last``, of any other target than the excluded one."""
        extents = [extent for node in _covering_nodes(first, last) for extent in self._nodes.get(node, ())]
        others = [extent for extent in extents if extent.claim.target != excluded]
        return max(others, key=lambda extent: extent.value, default=None)


def _best_two(known: tuple[_Extent[Rule], ...], extent: _Extent[Rule]) -> tuple[_Extent[Rule], ...]:
    """The highest, and the highest of another target; the earlier one where they are equal."""
    first, *rest = sorted((*known, extent), key=lambda one: -one.value)
    second = [one for one in rest if one.claim.target != first.claim.target]
    return (first, *second[:1])


def _covering_nodes(first: int, last: int) -> Iterator[int]:
    """The fewest nodes that have exactly the ports ``first`` to ``last`` below them; none where ``last`` is lower."""
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


class ConflictFinder(Generic[Rule]):
    """The claims on the ports of one address so far."""

    def __init__(self) -> None:
        self._equal: dict[PortRange, list[PortClaim[Rule]]] = {}
        self._by_last: _SegmentTree[Rule] = _SegmentTree()  # at the last port; highest: begins lowest
        self._by_first: _SegmentTree[Rule] = _SegmentTree()  # at the first port; highest: ends highest

    def add(self, claim: PortClaim[Rule]) -> Rule | None:
        """Add ``claim``. Gives the rule of an earlier claim that is in conflict with it, None where there is none."""
        found = self._find(claim.ports, claim.target)
        equal = self._equal.setdefault(claim.ports, [])
        # Of equal ranges two are enough, of different targets: any later claim differs from one of them.
        if len(equal) < 2 and all(one.target != claim.target for one in equal):
            equal.append(claim)
            self._by_last.add(claim.ports.last, _Extent(-claim.ports.first, claim))
            self._by_first.add(claim.ports.first, _Extent(claim.ports.last, claim))
        return found

    def _find(self, ports: PortRange, target: Hashable) -> Rule | None:
        for claim in self._equal.get(ports, ()):
            if claim.target != target:
                return claim.rule
        # A range that begins before this one and ends inside it, or one that begins inside it and ends after it.
        before = self._by_last.highest(ports.first, ports.last - 1, target)
        if before is not None and before.claim.ports.first < ports.first:
            return before.claim.rule
        after = self._by_first.highest(ports.first + 1, ports.last, target)
        if after is not None and after.claim.ports.last > ports.last:
            return after.claim.rule
        return None
