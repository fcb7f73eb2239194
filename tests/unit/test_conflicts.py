"""Which rules want the same ports, compared with a check of every pair."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.model.ports import MAX_PORT, PortRange
from graft.policy.conflicts import Claim, Rivals
from graft.policy.limits import MAX_RULES

EDGES = st.one_of(st.integers(1, 12), st.sampled_from([0, 80, 1023, 1024, 32767, 32768, 65534, MAX_PORT]))
RANGES = st.tuples(EDGES, EDGES).map(lambda edges: PortRange(*sorted(edges)))
CLAIMS = st.lists(st.tuples(RANGES, st.sampled_from("abc")), max_size=30)


def are_rivals(one: tuple[PortRange, str], other: tuple[PortRange, str]) -> bool:
    """Port by port: they meet, and neither has all that the other has, and more."""
    (ports, endpoint), (others, another) = one, other
    mine, yours = ports.mask, others.mask
    inside = mine != yours and mine & yours in (mine, yours)
    return endpoint != another and bool(mine & yours) and not inside


def test_a_claim_has_a_rival_exactly_where_an_earlier_one_is_one() -> None:
    found_one = 0

    @given(CLAIMS)
    @settings(max_examples=200, deadline=None)
    def check(claims: list[tuple[PortRange, str]]) -> None:
        nonlocal found_one
        rivals: Rivals[int] = Rivals()
        for index, claim in enumerate(claims):
            found = rivals.add(Claim(*claim, index))
            expected = [earlier for earlier in range(index) if are_rivals(claim, claims[earlier])]
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
    "crossing, of one endpoint": lambda index: (1 + index, 3000 + index, "a"),
    "inside of each other": lambda index: (1 + index, 65000 - index, str(index)),
    "side by side": lambda index: (1 + 20 * index, 15 + 20 * index, str(index)),
    "crossing, and rivals": lambda index: (1 + index, 3000 + index, str(index)),
}


def comparisons(shape: str, count: int) -> int:
    Counted.comparisons = 0
    rivals: Rivals[int] = Rivals()
    for index in range(count):
        first, last, endpoint = SHAPES[shape](index)
        rivals.add(Claim(PortRange(first, last), Counted(endpoint), index))
    return Counted.comparisons


@pytest.mark.parametrize("shape", SHAPES)
def test_four_times_the_claims_take_about_four_times_the_work(shape: str) -> None:
    small, big = comparisons(shape, MAX_RULES // 4), comparisons(shape, MAX_RULES)
    assert big < 6 * small  # a check of every pair would be 16 times as much
