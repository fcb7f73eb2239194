"""Shares: no member's part can be taken by others, and what is not reserved is lent."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from graft.splice.shares import Share, Shares


def filled(share: Share, count: int = 1) -> int:
    """How many a member has when it has taken all that it may."""
    while share.can_take(count):
        share.take(count)
    return share.taken


def test_a_single_member_has_three_quarters_and_the_rest_is_for_the_next() -> None:
    shares = Shares(100)
    assert filled(shares.join()) == 75
    assert filled(shares.join()) == 16


@pytest.mark.parametrize("count", [2, 5, 50])
def test_a_busy_member_among_idle_ones_has_more_than_half(count: int) -> None:
    shares = Shares(1000)
    members = [shares.join() for _ in range(count)]
    assert filled(members[0]) >= 500
    assert all(filled(one) >= shares.part == 1000 // (2 * count + 2) for one in members[1:])


def test_the_base_of_each_member_is_not_free_for_others() -> None:
    shares = Shares(100, base=10)
    members = [shares.join() for _ in range(4)]
    assert sum(map(filled, members)) <= 60


def test_a_part_has_room_for_something_however_little_there_is() -> None:
    shares = Shares(10, base=6, min_part=2)
    members = [shares.join() for _ in range(20)]
    assert all(filled(one, 2) >= 2 for one in members)


def test_nothing_is_lent_of_nothing() -> None:
    assert filled(Shares(0).join()) == 0


def test_the_member_with_most_beyond_its_part_is_the_largest_borrower() -> None:
    shares = Shares(100)
    first, second = shares.join(), shares.join()
    assert Shares.largest_borrower([first, second]) is None
    filled(first)
    assert Shares.largest_borrower([first, second]) is first
    assert Shares.largest_borrower([second]) is None


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(1, 3), st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=200))
def test_while_no_member_joins_none_finds_its_part_taken(limit: int, count: int, steps: list[tuple[int, bool]]) -> None:
    shares = Shares(limit)
    members = [shares.join() for _ in range(5)]
    for who, takes in steps:
        member = members[who]
        if takes and member.can_take(count):
            member.take(count)
        elif not takes and member.taken >= count:
            member.give_back(count)
        assert shares.free >= 0
        assert all(one.can_take(count) for one in members if one.within_part(count))


class AnyOrder(RuleBasedStateMachine):
    """Members that come, take, give and go as they like."""

    members: Bundle[Share] = Bundle("members")

    def __init__(self) -> None:
        super().__init__()
        self.shares = Shares(200)
        self.there: list[Share] = []

    @rule(target=members)
    def join(self) -> Share:
        self.there.append(self.shares.join())
        return self.there[-1]

    @rule(member=members, count=st.integers(1, 300))
    def take(self, member: Share, count: int) -> None:
        for _ in range(count):
            if member.can_take():
                member.take()

    @rule(member=members, count=st.integers(1, 300))
    def give(self, member: Share, count: int) -> None:
        member.give_back(min(count, member.taken))

    @rule(member=consumes(members))
    def leave(self, member: Share) -> None:
        self.shares.leave(member)
        self.there.remove(member)

    @invariant()
    def no_more_is_taken_than_there_is(self) -> None:
        assert self.shares.free == 200 - sum(one.taken for one in self.there) >= 0

    @invariant()
    def a_member_below_its_part_gets_one_or_another_has_borrowed_it(self) -> None:
        for one in self.there:
            if one.within_part():
                assert one.can_take() or self.shares.largest_borrower(self.there) not in (None, one)


AnyOrder.TestCase.settings = settings(max_examples=50, deadline=None)
TestAnyOrder = AnyOrder.TestCase
