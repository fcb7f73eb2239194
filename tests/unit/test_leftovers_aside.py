"""What ended containers have left is closed by so many children at once and no more, with a simulated kernel."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graft.kernel import sockets
from graft.model.transport import Transport
from graft.state import helper_process, leftovers, origins
from graft.state.helper_process import HelperResult
from graft.state.leftovers_aside import MOST_CHILDREN, LeftoversAside
from graft.state.origins import Place
from graft.state.records import Container


class Simulated:
    """The containers whose sockets the running children list and close; ``full``: no more can be made."""

    def __init__(self) -> None:
        self.children: dict[int, Path] = {}
        self.namespaces = 0
        self.full = False
        self._last = 100

    def run_each(self, work: Any, items: Sequence[Place], timeout: float, keep_running: bool) -> HelperResult[None]:
        assert not timeout and keep_running
        if self.full:
            raise BlockingIOError
        self._last += 1
        self.children[self._last] = items[0].paths[0]
        return HelperResult({}, self._last)

    def waitpid(self, pid: int, options: int) -> tuple[int, int]:
        return (0, 0) if pid in self.children else (pid, 0)

    @contextlib.contextmanager
    def open(self, stored: Any) -> Iterator[list[Path]]:
        self.namespaces += 1
        yield [Path(f"/{self.namespaces}")]
        self.namespaces -= 1


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    made = Simulated()
    monkeypatch.setattr(sockets, "can_destroy", lambda: True)
    monkeypatch.setattr(leftovers, "_find", lambda *_: pytest.fail("listed by the process that serves others"))
    monkeypatch.setattr(origins, "of_ended", lambda *_: frozenset())
    monkeypatch.setattr(helper_process, "run_each", made.run_each)
    monkeypatch.setattr(os, "waitpid", made.waitpid)
    return made


Ends = Callable[[int], None]


@pytest.fixture
def aside(simulated: Simulated) -> LeftoversAside:
    return LeftoversAside(graft_of(simulated))


@pytest.fixture
def ends(simulated: Simulated, aside: LeftoversAside) -> Ends:
    """A container ends."""

    def end(number: int) -> None:
        container = Container(number, "web", "/none", Transport.SWAP, 1, "web", ())
        with aside.closed_after(graft_of(simulated), container):
            pass

    return end


def graft_of(simulated: Simulated) -> Any:
    return SimpleNamespace(settings=None, endpoints=SimpleNamespace(listing=lambda: (), namespaces=simulated.open))


def test_a_child_does_it_and_the_namespaces_stay_open_until_it_has_ended(
    simulated: Simulated, aside: LeftoversAside, ends: Ends
) -> None:
    ends(1)
    aside.go_on()
    assert list(simulated.children) == [101] and simulated.namespaces == 1
    simulated.children.clear()
    aside.go_on()
    assert not simulated.children and not simulated.namespaces


def test_there_are_so_many_children_and_the_next_waits_for_one(
    simulated: Simulated, aside: LeftoversAside, ends: Ends
) -> None:
    for number in range(1, 100 * MOST_CHILDREN):
        ends(number)
    assert len(simulated.children) == MOST_CHILDREN
    assert simulated.namespaces <= 5 * MOST_CHILDREN
    del simulated.children[101]
    aside.go_on()
    assert len(simulated.children) == MOST_CHILDREN and 101 + MOST_CHILDREN in simulated.children


def test_where_no_process_can_be_made_it_is_tried_again(
    simulated: Simulated, aside: LeftoversAside, ends: Ends
) -> None:
    simulated.full = True
    ends(1)
    aside.go_on()
    assert not simulated.children and simulated.namespaces == 1
    simulated.full = False
    aside.go_on()
    assert len(simulated.children) == 1


def test_a_process_that_cannot_be_made_costs_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", fork)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BlockingIOError):
        helper_process.run_each(str, [1])
    with pytest.raises(BlockingIOError):
        helper_process.Question(lambda: 1)
    assert os.listdir("/proc/self/fd") == before
