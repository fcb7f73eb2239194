"""Callers that did not hear the answer to their call: remembered, once, and never more than a few."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graft.unheard import Unheard


def test_a_caller_is_found_once() -> None:
    unheard = Unheard()
    assert not unheard
    unheard.add(7, 3)
    assert unheard
    assert not unheard.take(7, 4) and not unheard.take(8, 3)
    assert unheard.take(7, 3)
    assert not unheard.take(7, 3) and not unheard


def test_the_oldest_is_forgotten_first() -> None:
    unheard = Unheard(2)
    unheard.add(1, 3)
    unheard.add(2, 3)
    unheard.add(1, 3)  # again: the newest now
    unheard.add(3, 3)
    assert [unheard.take(thread, 3) for thread in (1, 2, 3)] == [True, False, True]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3))), st.integers(1, 8))
def test_there_are_never_more_than_the_most_and_the_last_one_is_among_them(
    calls: list[tuple[int, int]], most: int
) -> None:
    unheard = Unheard(most)
    for thread, fd in calls:
        unheard.add(thread, fd)
        assert len(unheard) <= most
    if calls:
        assert unheard.take(*calls[-1])
