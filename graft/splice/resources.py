"""What the containers have of the daemon: each an account, with its turns in the loop and its share of descriptors.

How much a container may have is decided in shares.py. A connection that it may not have is not accepted: it waits in
the kernel's queue of its listener, like one that a busy program has not accepted yet, until there is room.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

from graft.splice.event_loop import EventLoop
from graft.splice.pipes import Pipe, Pipes
from graft.splice.shares import Share, Shares

_RESERVED = 512  # descriptors for all that is no container's
_AT_REST = 4  # a container's own: its namespace, and the sockets that look and listen there
_A_CONNECTION = 2
_MOST_LISTENERS = 1024


class Resettable(Protocol):
    """A connection (connection.Connection)."""

    def reset(self) -> None:
        """End it now, and give back what it has."""


Accept = Callable[[], None]
"""What a listener does when there is room."""


class Account:
    """One container's part in the daemon; ``number`` is the container's."""

    def __init__(self, room: Resources, number: int) -> None:
        self.room, self.number, self.loop = room, number, room.loop
        self.descriptors, self.pipes = room.descriptors.join(), room.pipes.join()
        self.connections: dict[Resettable, None] = {}
        """All that are relayed for it, oldest first."""
        self._full: dict[Accept, None] = {}

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """`EventLoop.watch`, in its turns."""
        self.loop.watch(fd, events, handler, self.number)

    def later(self, call: Callable[[], None]) -> None:
        """`EventLoop.later`, in its turns."""
        self.loop.later(call, self.number)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """`EventLoop.after`, in its turns."""
        self.loop.after(seconds, call, self.number)

    def admit(self) -> bool:
        """Take what one more connection needs, for `dismiss` to give back. False where it may not have one now."""
        if not self._may_connect():
            return False
        self.descriptors.take(_A_CONNECTION)
        return True

    def _may_connect(self) -> bool:
        if not self.descriptors.may(_A_CONNECTION):
            if not self.descriptors.owns(_A_CONNECTION):
                return False
            self.room.recall(_A_CONNECTION)
        return self.descriptors.may(_A_CONNECTION)

    def dismiss(self) -> None:
        """Give back what a connection had."""
        self.descriptors.give(_A_CONNECTION)
        if self.room.waiting:
            self.room.look_again()

    def wait(self, accept: Accept) -> None:
        """Have ``accept`` called when there is room."""
        self._full[accept] = None
        self.room.waiting[self] = None

    def leave(self, accept: Accept) -> None:
        """``accept`` waits no more."""
        self._full.pop(accept, None)
        if not self._full:
            self.room.waiting.pop(self, None)

    def let_in(self) -> None:
        """Have listeners that wait accept again, as many as there is room for."""
        if self.descriptors.may(_A_CONNECTION):
            for accept in list(itertools.islice(self._full, self.room.descriptors.free // _A_CONNECTION)):
                self.leave(accept)
                self.later(accept)

    @property
    def most_listeners(self) -> int:
        """How many endpoints may be listened on for it: half of its part goes to listeners, at the most."""
        return min(_MOST_LISTENERS, self.room.descriptors.part // 2)

    def take_pipe(self) -> Pipe | None:
        """A pipe; None where it has to do without, because it has its share or there is none."""
        if not self.pipes.may():
            return None
        pipe = self.room.stock.take()
        if pipe is not None:
            self.pipes.take()
        return pipe

    def give_pipe(self, pipe: Pipe) -> None:
        """Give an empty one back."""
        self.pipes.give()
        self.room.stock.give(pipe)

    def drop_pipe(self, pipe: Pipe) -> None:
        """Give one back that still holds data of a connection that was reset."""
        self.pipes.give()
        pipe.close()

    def close(self) -> None:
        """The container is served no more; its connections and listeners are closed."""
        self.room.leave(self)


class Resources:
    """The descriptors and pipes of one process, which may have ``descriptors`` in all, and ``pipes`` of them."""

    def __init__(self, loop: EventLoop, descriptors: int, pipes: int | None = None) -> None:
        most_pipes = max(8, min(1024, descriptors // 16)) if pipes is None else pipes
        for_connections = descriptors - min(_RESERVED, descriptors // 2) - 2 * most_pipes
        self.loop = loop
        self.descriptors = Shares(for_connections, _AT_REST, _A_CONNECTION)
        self.pipes = Shares(most_pipes)
        self.stock = Pipes()
        self.waiting: dict[Account, None] = {}
        """Those with listeners that wait for room."""
        self._accounts: dict[Share, Account] = {}

    @property
    def members(self) -> int:
        """How many containers there are."""
        return len(self._accounts)

    def account(self, number: int) -> Account:
        """A new one, for `Account.close` to end."""
        made = Account(self, number)
        self._accounts[made.descriptors] = made
        return made

    def leave(self, account: Account) -> None:
        """Forget an account."""
        self.waiting.pop(account, None)
        del self._accounts[account.descriptors]
        self.descriptors.leave(account.descriptors)
        self.pipes.leave(account.pipes)
        self.loop.forget(account.number)
        self.look_again()

    def recall(self, count: int) -> None:
        """Have ``count`` descriptors that were lent given back, if there are any: the newest connections are reset."""
        while self.descriptors.free < count:
            debtor = Shares.debtor(share for share, account in self._accounts.items() if account.connections)
            if debtor is None:
                return
            next(reversed(self._accounts[debtor].connections)).reset()

    def look_again(self) -> None:
        """There is room, perhaps: see who waits for some."""
        self.loop.later(self._let_in)

    def _let_in(self) -> None:
        for account in list(self.waiting):
            account.let_in()

    def close(self) -> None:
        """Give back the pipes in stock."""
        self.stock.close()
