"""Who has how many entries of the maps for clients over IPv4, which all containers share (bpf/exchange.bpf.c).

What the sockets of a container begin by themselves has room of its own: so many slots for each container, used or not.
What is left is for clients, and divided as shares.py says. So what fills the share of one container takes nothing from
another one; and where the maps have no room for one container more, its datagrams are not relayed.
"""

from __future__ import annotations

import errno
from typing import Protocol

from graft.datapath import layout
from graft.splice.shares import Share, Shares

_LEAST_CLIENTS = 16
"""That many each container can have, or it is not served."""


class ClientTable(Protocol):
    """The clients of one container."""

    def remove_unanswered(self) -> bool:
        """Remove the longest unanswered one; False where there is none."""

    def remove_any(self) -> bool:
        """The same, or else one that was answered."""


class ClientPlaces:
    """Those of all containers."""

    def __init__(self, limit: int = layout.MAX_EXCHANGES) -> None:
        self._shares = Shares(limit, layout.EXCHANGE_OUT_SLOTS, _LEAST_CLIENTS)
        self._tables: dict[Share, ClientTable] = {}

    @property
    def has_room(self) -> bool:
        """Whether there is room for one container more."""
        return self._shares.can_join()

    def join(self, table: ClientTable) -> Share:
        """The share of one container more. Raises OSError where there is no room for it."""
        if not self.has_room:
            raise OSError(errno.ENOBUFS, "the datagrams of as many containers are relayed as there is room for")
        share = self._shares.join()
        self._tables[share] = table
        return share

    def leave(self, share: Share) -> None:
        """Undo `join`. Safe to repeat."""
        if self._tables.pop(share, None) is not None:
            self._shares.leave(share)

    def make_room(self, share: Share) -> None:
        """Remove clients, until there is room for one of that share: of its own, or, if it has less than its part, of
        the container that has most beyond its part. Raises OSError where there is none.
        """
        while not share.can_take():
            borrower = Shares.largest_borrower(self._tables) if share.within_part() else None
            if borrower is None:
                removed = self._tables[share].remove_unanswered()
            else:
                removed = self._tables[borrower].remove_any()
            if not removed:
                raise OSError(errno.ENOBUFS, "the container has as many clients as it may have")
