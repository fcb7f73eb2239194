"""Callers that did not get the answer to their call: remembered, once, and never more than a few."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graft.swap.unreported import UnreportedBinds


def test_a_caller_is_found_once() -> None:
    unreported = UnreportedBinds()
    assert not unreported
    unreported.add(7, 3)
    assert unreported
    assert not unreported.take(7, 4) and not unreported.take(8, 3)
    assert unreported.take(7, 3)
    assert not unreported.take(7, 3) and not unreported


def test_the_oldest_is_forgotten_first() -> None:
    unreported = UnreportedBinds(2)
    unreported.add(1, 3)
    unreported.add(2, 3)
    unreported.add(1, 3)  # again: the newest now
    unreported.add(3, 3)
    assert [unreported.take(thread, 3) for thread in (1, 2, 3)] == [True, False, True]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3))), st.integers(1, 8))
def test_there_are_never_more_than_the_most_and_the_last_one_is_among_them(
    calls: list[tuple[int, int]], most: int
) -> None:
    unreported = UnreportedBinds(most)
    for thread, fd in calls:
        unreported.add(thread, fd)
        assert len(unreported) <= most
    if calls:
        assert unreported.take(*calls[-1])
