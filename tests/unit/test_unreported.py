"""Callers that did not get the result of their bind: each is found once, and their number is limited."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graft.swap.unreported import UnreportedBinds


def test_a_caller_is_found_once() -> None:
    unreported = UnreportedBinds()
    assert not unreported
    unreported.add(7, 3)
    assert unreported
    assert not unreported.remove(7, 4) and not unreported.remove(8, 3)
    assert unreported.remove(7, 3)
    assert not unreported.remove(7, 3) and not unreported


def test_the_oldest_is_dropped_first() -> None:
    unreported = UnreportedBinds(2)
    unreported.add(1, 3)
    unreported.add(2, 3)
    unreported.add(1, 3)  # now the newest
    unreported.add(3, 3)
    assert [unreported.remove(thread, 3) for thread in (1, 2, 3)] == [True, False, True]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3))), st.integers(1, 8))
def test_there_are_never_more_than_the_limit_and_the_newest_is_among_them(
    calls: list[tuple[int, int]], limit: int
) -> None:
    unreported = UnreportedBinds(limit)
    for thread, fd in calls:
        unreported.add(thread, fd)
        assert len(unreported) <= limit
    if calls:
        assert unreported.remove(*calls[-1])
