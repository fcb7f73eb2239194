"""How much of something limited each member may have. Pure.

Half of all is divided among the members, with one part more for the next member to join. Such a part is reserved for
each member, used or not. The rest is lent to any member that asks, while what is reserved for the others stays free:

    |  A's part  |  B's part  | the next |           lent to any member that asks           |

So no member can take another's part, whatever it does, and one that is busy among idle ones has more than half of all.

When a member joins, all parts get smaller, and more may be lent than would be now. `largest_borrower` is the member
with most beyond its part: it has to give back when a member that has less than its part finds nothing free.
"""

from __future__ import annotations

from collections.abc import Iterable


class Shares:
    """``limit`` things in all, of which each member always uses ``base``. A part is never less than ``min_part``."""

    def __init__(self, limit: int, base: int = 0, min_part: int = 0) -> None:
        self._limit, self._base, self._min_part = limit, base, min_part
        self._members: dict[Share, None] = {}
        self._all = 0
        self.part = self.free = 0
        """How many are reserved for each member; how many are not taken."""
        self._divide()

    def can_join(self) -> bool:
        """Whether there is so much for one member more that no part gets less than the least."""
        members = len(self._members) + 1
        return self._limit - self._base * members >= 2 * (members + 1) * self._min_part

    def join(self) -> Share:
        """A new member, which has nothing yet."""
        made = Share(self)
        self._members[made] = None
        self._divide()
        return made

    def leave(self, member: Share) -> None:
        """Remove a member; what it has is free."""
        self.free += member.taken
        del self._members[member]
        self._divide()

    def _divide(self) -> None:
        parts = 2 * (len(self._members) + 1)
        taken = self._all - self.free
        self._all = max(self._limit - self._base * len(self._members), parts * self._min_part)
        self.free = self._all - taken
        self.part = self._all // parts

    def reserved_for_others(self, member: Share) -> int:
        """How many ``member`` cannot have, because they are reserved for the others and for the next to join."""
        unused = sum(self.part - other.taken for other in self._members if other.taken < self.part)
        return unused - max(0, self.part - member.taken) + self.part

    @staticmethod
    def largest_borrower(among: Iterable[Share]) -> Share | None:
        """Which of ``among`` has most beyond its part; None where none of them has more than its part."""
        found = max(among, key=lambda member: member.taken, default=None)
        return None if found is None or found.within_part(0) else found


class Share:
    """What one member has of ``shares``."""

    __slots__ = ("shares", "taken")

    def __init__(self, shares: Shares) -> None:
        self.shares = shares
        self.taken = 0
        """How many it has now."""

    def within_part(self, count: int = 1) -> bool:
        """Whether it would have no more than its part with ``count`` more."""
        return self.taken + count <= self.shares.part

    def can_take(self, count: int = 1) -> bool:
        """Whether it may have ``count`` more now."""
        shares = self.shares
        if self.taken + count <= shares.part:
            return shares.free >= count
        return shares.free - count >= shares.reserved_for_others(self)

    def take(self, count: int = 1) -> None:
        """Note that it has ``count`` more."""
        self.taken += count
        self.shares.free -= count

    def give_back(self, count: int = 1) -> None:
        """Note that it has ``count`` fewer."""
        self.taken -= count
        self.shares.free += count
