"""Who may have one more of something that there is a limited number of. Pure.

Half of all is divided among the members, with one part more for whoever joins next. Such a part is kept for each
member, used or not. The rest is lent to whoever asks, while what is kept for the others stays free:

    |  A's part  |  B's part  | the next |             lent to whoever asks              |

So no member can take another's part, whatever it does, and one that is busy among idle ones has more than half of all.

When a member joins, all parts get smaller, and more may be lent than would be now. `debtor` says who has most beyond
its part: it has to give back when a member that has less than its part finds nothing free.
"""

from __future__ import annotations

from collections.abc import Iterable


class Shares:
    """``limit`` things in all, of which each member takes ``rest`` by being one."""

    def __init__(self, limit: int, rest: int = 0, least: int = 0) -> None:
        """``least`` is what a part is never smaller than, whatever the limit."""
        self._limit, self._rest, self._least = limit, rest, least
        self._members: dict[Share, None] = {}
        self._all = 0
        self.part = self.free = 0
        """What is kept for each member; how many nobody has."""
        self._divide()

    def join(self) -> Share:
        """A new member, which has nothing yet."""
        made = Share(self)
        self._members[made] = None
        self._divide()
        return made

    def leave(self, member: Share) -> None:
        """Forget a member; what it has is free."""
        self.free += member.taken
        del self._members[member]
        self._divide()

    def _divide(self) -> None:
        parts = 2 * (len(self._members) + 1)
        taken = self._all - self.free
        self._all = max(self._limit - self._rest * len(self._members), parts * self._least)
        self.free = self._all - taken
        self.part = self._all // parts

    def kept_from(self, member: Share) -> int:
        """What a member cannot have, because it is kept for the others and for the next."""
        unused = sum(self.part - other.taken for other in self._members if other.taken < self.part)
        return unused - max(0, self.part - member.taken) + self.part

    @staticmethod
    def debtor(among: Iterable[Share]) -> Share | None:
        """Who ``among`` them has most of what was lent; None where none of them has any."""
        found = max(among, key=lambda member: member.taken, default=None)
        return None if found is None or found.owns(0) else found


class Share:
    """What one member has."""

    __slots__ = ("_of", "taken")

    def __init__(self, of: Shares) -> None:
        self._of = of
        self.taken = 0
        """How many it has now."""

    def owns(self, count: int = 1) -> bool:
        """Whether it would have no more than its part with ``count`` more."""
        return self.taken + count <= self._of.part

    def may(self, count: int = 1) -> bool:
        """Whether it may have ``count`` more now."""
        shares = self._of
        if self.taken + count <= shares.part:
            return shares.free >= count
        return shares.free - count >= shares.kept_from(self)

    def take(self, count: int = 1) -> None:
        """Note that it has ``count`` more."""
        self.taken += count
        self._of.free -= count

    def give(self, count: int = 1) -> None:
        """Note that it has ``count`` fewer."""
        self.taken -= count
        self._of.free += count
