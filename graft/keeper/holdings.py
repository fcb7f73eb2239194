"""The descriptors that the keeper has open for graftd, by their names, in the order in which they came."""

from __future__ import annotations

import os
from collections.abc import Sequence

from graft.keeper import protocol
from graft.keeper.closing import Closer


class Holdings:
    """Names, each with one descriptor or more. ``closer`` closes those that are kept no more."""

    def __init__(self, closer: Closer) -> None:
        self._closer = closer
        self._by_name: dict[str, list[int]] = {}
        self._names = 0

    def add(self, name: str, fds: Sequence[int]) -> bool:
        """Keep ``fds``. False, and they are closed, where the name is none, or graftd could not be told all names."""
        size = len(fds) * (len(name) + 1)
        if not protocol.is_name(name) or self._names + size > protocol.MAX_NAMES:
            self._closer.close(fds)
            return False
        self._by_name.setdefault(name, []).extend(fds)
        self._names += size
        return True

    def remove(self, name: str) -> None:
        """Close all that have this name."""
        fds = self._by_name.pop(name, [])
        self._names -= len(fds) * (len(name) + 1)
        self._closer.close(fds)

    def items(self) -> list[tuple[str, int]]:
        """Every descriptor with its name."""
        return [(name, fd) for name, fds in self._by_name.items() for fd in fds]


def arrange(fds: Sequence[int], first: int) -> None:
    """Give ``fds`` the numbers from ``first`` on, for the program that this process executes next; it inherits them.

    Another descriptor that has one of these numbers is closed, one of ``fds`` gets another number first.
    """
    at = {fd: index for index, fd in enumerate(fds)}
    where = list(fds)
    for index in range(len(where)):
        target = first + index
        other = at.get(target)
        if where[index] == target:
            os.set_inheritable(target, True)
            continue
        if other is not None:
            where[other] = os.dup(target)
            at[where[other]] = other
        os.dup2(where[index], target, inheritable=True)
        del at[where[index]]
        os.close(where[index])
        at[target] = index
