"""Which sockets of a container are closed when its rules are gone, with a simulated kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graft.kernel import sockets
from graft.kernel.sockdiag import Identity
from graft.kernel.sockets import Kind, ListedSocket
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.state import helper_process, inventory, withdrawal
from graft.state.helper_process import HelperResult
from graft.state.installation import Installation
from graft.state.inventory import ContainerSocket, Found, HostStack
from graft.state.records import Container
from graft.state.socket_holders import Place
from graft.state.stack_listing import NO_DOUBTS, Doubts
from graft.state.withdrawal import Withdrawal

CONTAINER = Container(7, "web", "/none", Transport.DIRECT, 1, "web", ())
SETTINGS, STACK = Settings.from_environment({}), HostStack({}, ())


def socket(cookie: int, state: str = "listening", granted: bool = True, protocol: str = "tcp") -> ContainerSocket:
    identity = Identity(2, 6, bytes(40) + cookie.to_bytes(8, "little"))
    listed = ListedSocket(cookie, protocol, state, "0.0.0.0:80", "0.0.0.0:0", identity)
    return ContainerSocket(listed, Path("/none"), (Place(1, 1, 3),), granted)


Withdraw = Callable[..., Withdrawal]


@pytest.fixture
def withdraw(monkeypatch: pytest.MonkeyPatch) -> Withdraw:
    """Withdraws the rules where the kernel lists these sockets, listing after listing (None: no answer). ``tagged``
    is what it lists by tags before that; ``hang`` and ``fail`` are cookies of sockets that it does not close.
    """

    def run(
        *listings: Iterable[ContainerSocket] | None,
        tagged: Sequence[Iterable[ContainerSocket]] = (),
        keep: bool = False,
        hang: Sequence[int] = (),
        fail: Sequence[int] = (),
        unlisted: Doubts = NO_DOUBTS,
    ) -> Withdrawal:
        left, left_tagged = list(listings), list(tagged)

        def sockets_by_container(
            settings: Settings,
            containers: Sequence[Container],
            stack: HostStack,
            closed: Sequence[ContainerSocket],
            seconds: float,
            doubts: Doubts,
        ) -> Found | None:
            spent.append(seconds)
            found = left.pop(0) if len(left) > 1 else left[0]
            return None if found is None else Found({CONTAINER.id: list(found)}, {CONTAINER.id: ()}, unlisted)

        def run_each(work: Any, items: Sequence[ContainerSocket], keep_running: bool = False) -> HelperResult[bool]:
            numbers = {number: one.listed.inode for number, one in enumerate(items)}
            results = {number: inode not in fail for number, inode in numbers.items() if inode not in hang}
            return HelperResult(results, 0 if len(results) == len(items) else 99)

        spent: list[float] = []
        monkeypatch.setattr(sockets, "can_destroy", lambda: bool(tagged))
        monkeypatch.setattr(
            inventory, "tagged", lambda *given: (list(left_tagged.pop(0) if left_tagged else ()), given[-1])
        )
        monkeypatch.setattr(inventory, "sockets_by_container", sockets_by_container)
        monkeypatch.setattr(helper_process, "run_each", run_each)
        monkeypatch.setattr(Installation, "refuse_replaced", lambda self: None)
        done = withdrawal.withdraw(Installation(SETTINGS), CONTAINER, STACK, keep)
        assert sum(spent) <= 2 * inventory.SEARCH, "however often it lists, it searches for seconds"
        return done

    return run


def test_what_was_granted_is_closed_and_the_rest_is_kept(withdraw: Withdraw) -> None:
    mine, other = socket(1), socket(2, granted=False)
    done = withdraw([mine, other], [other])
    assert (done.closed, done.still_open, done.kept) == ([mine], [], [other])
    assert done.all_listed and not done.helper_pid


def test_one_that_is_still_listed_after_it_was_closed_is_not_reported_again(withdraw: Withdraw) -> None:
    assert withdraw([socket(1)], [socket(1, "fin-wait-2")]).kept == []


def test_connections_can_be_kept(withdraw: Withdraw) -> None:
    listener, connection = socket(1), socket(2, "established")
    done = withdraw([listener, connection], [connection], keep=True)
    assert (done.closed, done.kept) == ([listener], [connection])


def test_a_connection_that_was_accepted_meanwhile_is_closed_too(withdraw: Withdraw) -> None:
    listener, late = socket(1), socket(2, "established")
    assert withdraw([listener], [late], []).closed == [listener, late]


def test_one_that_hangs_is_reported_with_the_helper_that_continues(withdraw: Withdraw) -> None:
    stuck, other = socket(1), socket(2)
    done = withdraw([stuck, other], [stuck], hang=[1])
    assert (done.closed, done.still_open, done.kept, done.helper_pid) == ([other], [stuck], [], 99)


def test_one_that_failed_because_it_was_gone_is_no_failure(withdraw: Withdraw) -> None:
    done = withdraw([socket(1)], [], fail=[1])
    assert (done.closed, done.still_open) == ([], [])


def test_one_that_failed_and_is_still_there_is(withdraw: Withdraw) -> None:
    assert withdraw([socket(1)], [socket(1)], fail=[1]).still_open == [socket(1)]


def test_a_bound_socket_is_kept(withdraw: Withdraw) -> None:
    bound = socket(1, "bound")
    done = withdraw([bound])
    assert (done.closed, done.kept) == ([], [bound])


def test_a_kernel_that_does_not_answer_is_reported(withdraw: Withdraw) -> None:
    assert not withdraw(None).all_listed
    done = withdraw([socket(1)], None)
    assert not done.all_listed and done.closed == [socket(1)]


def test_new_sockets_without_end_do_not_keep_it_busy_for_ever(withdraw: Withdraw) -> None:
    done = withdraw(*([socket(number)] for number in range(1, 40)))
    assert len(done.closed) < 10
    assert done.still_open == [socket(len(done.closed) + 1)] and done.kept == []


def unlocated(sock: ContainerSocket) -> ContainerSocket:
    return replace(sock, places=())


def test_what_is_known_by_its_tag_is_closed_before_processes_are_searched(withdraw: Withdraw) -> None:
    listener, accepted, other = socket(1), socket(2, "established"), socket(3, protocol="udp")
    done = withdraw([listener, other], [listener], tagged=[[unlocated(listener)], [accepted]])
    assert (done.closed, done.still_open, done.kept) == ([listener, accepted, other], [], [])


def test_one_whose_tag_is_known_and_that_hangs_is_not_tried_again(withdraw: Withdraw) -> None:
    stuck = socket(1)
    done = withdraw([stuck], tagged=[[stuck], [stuck]], hang=[1])
    assert (done.closed, done.still_open, done.helper_pid) == ([], [stuck], 99)


def test_one_that_failed_by_its_tag_is_tried_again_by_its_descriptor(withdraw: Withdraw) -> None:
    done = withdraw([socket(2), socket(3)], [], tagged=[[unlocated(socket(2))]], fail=[3])
    assert done.closed == [socket(2)]


def test_connections_that_are_to_be_kept_are_not_closed_by_their_tags(withdraw: Withdraw) -> None:
    connection = socket(2, "established")
    done = withdraw([connection], tagged=[[unlocated(connection)]], keep=True)
    assert (done.closed, done.kept) == ([], [connection])


def test_without_the_udp_sockets_what_is_listed_is_closed_and_the_rest_reported(withdraw: Withdraw) -> None:
    done = withdraw([socket(1)], [], unlisted=Doubts(frozenset([Kind.UDP]), frozenset([Kind.UDP])))
    assert [one.listed.inode for one in done.closed] == [1] and not done.all_listed
    assert done.doubts.names == ("UDP",)


def test_what_is_only_bound_need_not_be_listed(withdraw: Withdraw) -> None:
    done = withdraw([socket(1)], [], unlisted=Doubts(frozenset([Kind.BOUND]), frozenset([Kind.BOUND])))
    assert done.all_listed and done.doubts.names == ("bound TCP",)
