"""The owner that has used the least time goes first, and none waits for ever."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from graft.splice.turns import Turns


def named(made: list[str], name: str) -> Callable[[], None]:
    return lambda: made.append(name)


def run(turns: Turns, cost: dict[int, float], most: int = 1000) -> list[int]:
    """Make the waiting calls, each at the cost of its owner's; returns the owners in order."""
    order: list[int] = []
    while turns and len(order) < most:
        owner, call = turns.pop()
        call()
        turns.charge(owner, cost[owner])
        order.append(owner)
    return order


def test_an_owners_own_calls_are_made_in_order() -> None:
    turns, made = Turns(), list[str]()
    for name in "abc":
        turns.put(1, named(made, name))
    run(turns, {1: 1.0})
    assert made == ["a", "b", "c"]


def test_one_call_of_a_quiet_owner_goes_before_the_thousand_of_a_busy_one() -> None:
    turns = Turns()
    for _ in range(1000):
        turns.put(1, lambda: None)
    run(turns, {1: 1.0}, 10)
    turns.put(2, lambda: None)
    assert run(turns, {1: 1.0, 2: 1.0}).index(2) <= 1


def test_time_counts_and_not_the_number_of_calls() -> None:
    turns = Turns()
    for _ in range(100):
        turns.put(1, lambda: None)
        turns.put(2, lambda: None)
    order = run(turns, {1: 10.0, 2: 1.0}, 44)
    assert order.count(1) == 4


def test_time_that_was_not_used_is_not_saved_up() -> None:
    turns = Turns()
    for _ in range(1000):
        turns.put(1, lambda: None)
    turns.put(2, lambda: None)
    run(turns, {1: 1.0, 2: 1.0}, 500)
    for _ in range(100):
        turns.put(2, lambda: None)
    assert 4 <= run(turns, {1: 1.0, 2: 1.0}, 10).count(2) <= 6


def test_an_owner_that_is_forgotten_starts_level_and_its_calls_are_still_made() -> None:
    turns = Turns()
    turns.put(1, lambda: None)
    turns.forget(1)
    assert run(turns, {1: 1000.0}) == [1]
    for expected in ([1, 2], [2, 1]):  # level with the others, and from then on known like any other
        turns.put(1, lambda: None)
        turns.put(2, lambda: None)
        assert run(turns, {1: 1000.0, 2: 1.0}) == expected


def test_an_owner_that_is_held_waits_until_it_is_released() -> None:
    turns = Turns()
    for owner in (1, 2, 1, 2):
        turns.put(owner, lambda: None)
    turns.hold(1, 10.0)
    assert run(turns, {2: 1.0}) == [2, 2]
    turns.put(1, lambda: None)
    turns.release(9.9)
    assert not turns
    turns.release(10.0)
    assert run(turns, {1: 1.0}) == [1, 1, 1]


def test_what_is_done_for_an_owner_out_of_its_turns_is_charged_too() -> None:
    turns = Turns()
    for _ in range(3):
        turns.put(1, lambda: None)
        turns.put(2, lambda: None)
    turns.charge_other(1, 10.0)
    assert run(turns, {1: 1.0, 2: 1.0}) == [2, 2, 2, 1, 1, 1]


def test_a_call_may_put_another() -> None:
    turns, made = Turns(), list[str]()
    turns.put(1, lambda: turns.put(1, named(made, "second")))
    assert run(turns, {1: 1.0}) == [1, 1]
    assert made == ["second"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(0.001, 1.0)), min_size=1, max_size=100))
def test_every_call_is_made_once_and_none_gets_far_ahead(calls: list[tuple[int, float]]) -> None:
    turns = Turns()
    made: list[int] = []
    costs: dict[int, list[float]] = {}
    for number, (owner, cost) in enumerate(calls):
        turns.put(owner, lambda number=number: made.append(number))  # type: ignore[misc]
        costs.setdefault(owner, []).append(cost)
    used = dict.fromkeys(costs, 0.0)
    while turns:
        owner, call = turns.pop()
        assert all(used[owner] <= used[other] + 1e-9 for other in costs if costs[other])
        call()
        cost = costs[owner].pop(0)
        used[owner] += cost
        turns.charge(owner, cost)
    assert sorted(made) == list(range(len(calls)))
