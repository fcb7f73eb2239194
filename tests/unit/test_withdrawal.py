"""Which of a container's sockets are closed when its rules are removed, by a kernel that the test simulates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from graft.kernel.sockdiag import Identity
from graft.kernel.sockets import Listed
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.state import helper_process, inventory, withdrawal
from graft.state.descriptors import Place
from graft.state.helper_process import HelperResult
from graft.state.inventory import ContainerSocket, HostStack
from graft.state.records import Container
from graft.state.withdrawal import Withdrawn

CONTAINER = Container(7, "web", "/none", Transport.DIRECT, 1, "web", ())
SETTINGS, STACK = Settings.from_environment({}), HostStack({}, ())


def socket(cookie: int, state: str = "listening", granted: bool = True, protocol: str = "tcp") -> ContainerSocket:
    identity = Identity(2, 6, bytes(40) + cookie.to_bytes(8, "little"))
    listed = Listed(cookie, protocol, state, "0.0.0.0:80", "0.0.0.0:0", identity)
    return ContainerSocket(listed, Path("/none"), (Place(1, 1, 3),), granted)


Withdraw = Callable[..., Withdrawn]


@pytest.fixture
def withdraw(monkeypatch: pytest.MonkeyPatch) -> Withdraw:
    """Withdraws the rules where the kernel lists these sockets, listing after listing (None: no answer). ``hang`` and
    ``fail`` are cookies of sockets that it does not close.
    """

    def run(
        *listings: Iterable[ContainerSocket] | None,
        keep: bool = False,
        hang: Sequence[int] = (),
        fail: Sequence[int] = (),
    ) -> Withdrawn:
        left = list(listings)

        def of(
            settings: Settings, containers: Sequence[Container], stack: HostStack
        ) -> dict[int, list[ContainerSocket]] | None:
            found = left.pop(0) if len(left) > 1 else left[0]
            return None if found is None else {CONTAINER.id: list(found)}

        def each(work: Any, items: Sequence[ContainerSocket], finish: bool = False) -> HelperResult[bool]:
            numbers = {number: one.listed.inode for number, one in enumerate(items)}
            results = {number: inode not in fail for number, inode in numbers.items() if inode not in hang}
            return HelperResult(results, 0 if len(results) == len(items) else 99)

        monkeypatch.setattr(inventory, "of", of)
        monkeypatch.setattr(helper_process, "each", each)
        return withdrawal.withdraw(SETTINGS, CONTAINER, STACK, keep)

    return run


def test_granted_sockets_are_closed_and_the_others_are_left(withdraw: Withdraw) -> None:
    mine, other = socket(1), socket(2, granted=False)
    done = withdraw([mine, other], [other])
    assert (done.ended, done.unended, done.left) == ([mine], [], [other])
    assert done.known and not done.helper


def test_a_closed_socket_that_is_still_listed_is_not_reported_as_left(withdraw: Withdraw) -> None:
    assert withdraw([socket(1)], [socket(1, "fin-wait-2")]).left == []


def test_connections_can_be_kept(withdraw: Withdraw) -> None:
    listener, connection = socket(1), socket(2, "established")
    done = withdraw([listener, connection], [connection], keep=True)
    assert (done.ended, done.left) == ([listener], [connection])


def test_a_connection_that_was_accepted_meanwhile_is_closed_too(withdraw: Withdraw) -> None:
    listener, late = socket(1), socket(2, "established")
    assert withdraw([listener], [late], []).ended == [listener, late]


def test_a_socket_that_could_not_be_closed_is_reported_with_the_helper_process(withdraw: Withdraw) -> None:
    stuck, other = socket(1), socket(2)
    done = withdraw([stuck, other], [stuck], hang=[1])
    assert (done.ended, done.unended, done.left, done.helper) == ([other], [stuck], [], 99)


def test_a_socket_that_was_gone_already_is_no_failure(withdraw: Withdraw) -> None:
    done = withdraw([socket(1)], [], fail=[1])
    assert (done.ended, done.unended) == ([], [])


def test_a_socket_that_is_still_there_is_a_failure(withdraw: Withdraw) -> None:
    assert withdraw([socket(1)], [socket(1)], fail=[1]).unended == [socket(1)]


def test_a_bound_socket_is_left(withdraw: Withdraw) -> None:
    bound = socket(1, "bound")
    done = withdraw([bound])
    assert (done.ended, done.left) == ([], [bound])


def test_it_is_reported_that_the_kernel_does_not_answer(withdraw: Withdraw) -> None:
    assert not withdraw(None).known
    done = withdraw([socket(1)], None)
    assert not done.known and done.ended == [socket(1)]


def test_very_many_new_sockets_do_not_keep_it_busy_for_ever(withdraw: Withdraw) -> None:
    done = withdraw(*([socket(number)] for number in range(1, 40)))
    assert len(done.ended) < 10
    assert done.unended == [socket(len(done.ended) + 1)] and done.left == []
