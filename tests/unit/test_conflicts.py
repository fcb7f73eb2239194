"""Port ranges in conflict: the result is compared with that of checking every pair."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.model.ports import MAX_PORT, PortRange
from graft.policy.conflicts import ConflictFinder, PortClaim
from graft.policy.limits import MAX_RULES

EDGES = st.one_of(st.integers(1, 12), st.sampled_from([0, 80, 1023, 1024, 32767, 32768, 65534, MAX_PORT]))
RANGES = st.tuples(EDGES, EDGES).map(lambda edges: PortRange(*sorted(edges)))
CLAIMS = st.lists(st.tuples(RANGES, st.sampled_from("abc")), max_size=30)


def in_conflict(one: tuple[PortRange, str], other: tuple[PortRange, str]) -> bool:
    """Port by port: they overlap, and neither contains the other and more."""
    (ports, endpoint), (others, another) = one, other
    mine, yours = ports.mask, others.mask
    inside = mine != yours and mine & yours in (mine, yours)
    return endpoint != another and bool(mine & yours) and not inside


def test_a_conflict_is_found_exactly_where_an_earlier_claim_is_in_conflict() -> None:
    found_one = 0

    @given(CLAIMS)
    @settings(max_examples=200, deadline=None)
    def check(claims: list[tuple[PortRange, str]]) -> None:
        nonlocal found_one
        finder: ConflictFinder[int] = ConflictFinder()
        for index, claim in enumerate(claims):
            found = finder.add(PortClaim(*claim, index))
            expected = [earlier for earlier in range(index) if in_conflict(claim, claims[earlier])]
            assert found in expected if expected else found is None
            found_one += found is not None

    check()
    assert found_one > 0


class Counted(str):
    """An endpoint's name that counts how often it is compared."""

    comparisons = 0

    def __ne__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__ne__(self, other)

    __hash__ = str.__hash__


SHAPES: dict[str, Any] = {
    "equal": lambda index: (80, 80, "a"),
    "overlapping, of one endpoint": lambda index: (1 + index, 3000 + index, "a"),
    "nested": lambda index: (1 + index, 65000 - index, str(index)),
    "disjoint": lambda index: (1 + 20 * index, 15 + 20 * index, str(index)),
    "overlapping, in conflict": lambda index: (1 + index, 3000 + index, str(index)),
}


def comparisons(shape: str, count: int) -> int:
    Counted.comparisons = 0
    finder: ConflictFinder[int] = ConflictFinder()
    for index in range(count):
        first, last, endpoint = SHAPES[shape](index)
        finder.add(PortClaim(PortRange(first, last), Counted(endpoint), index))
    return Counted.comparisons


@pytest.mark.parametrize("shape", SHAPES)
def test_four_times_the_claims_take_about_four_times_the_work(shape: str) -> None:
    small, big = comparisons(shape, MAX_RULES // 4), comparisons(shape, MAX_RULES)
    assert big < 6 * small  # checking every pair would take 16 times as much
