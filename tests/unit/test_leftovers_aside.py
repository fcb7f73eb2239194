"""What ended containers have left is closed by so many children at once and no more, with a simulated kernel."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graft.kernel import sockets
from graft.model.transport import Transport
from graft.state import helper_process, leftovers
from graft.state.helper_process import HelperResult
from graft.state.leftovers_aside import MOST_CHILDREN, LeftoversAside
from graft.state.records import Container


class Simulated:
    """How many sockets each container has left, and the containers whose sockets the running children close."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.children: dict[int, int] = {}
        self.namespaces = 0
        self._last = 100

    def left_of(self, settings: Any, paths: Any, number: int) -> list[Any]:
        return [number] * self.left.get(number, 0)

    def run_each(self, work: Any, items: list[Any], timeout: float, keep_running: bool) -> HelperResult[None]:
        assert not timeout and keep_running
        self._last += 1
        self.children[self._last] = items[0]
        return HelperResult({}, self._last)

    def end(self, child: int, left: int = 0) -> None:
        self.left[self.children.pop(child)] = left

    def waitpid(self, pid: int, options: int) -> tuple[int, int]:
        return (0, 0) if pid in self.children else (pid, 0)

    @contextlib.contextmanager
    def open(self, stored: Any) -> Iterator[list[Path]]:
        self.namespaces += 1
        yield []
        self.namespaces -= 1


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    made = Simulated()
    monkeypatch.setattr(sockets, "can_destroy", lambda: True)
    monkeypatch.setattr(leftovers, "left_of", made.left_of)
    monkeypatch.setattr(helper_process, "run_each", made.run_each)
    monkeypatch.setattr(os, "waitpid", made.waitpid)
    return made


Ends = Callable[[int, int], None]


@pytest.fixture
def aside(simulated: Simulated) -> LeftoversAside:
    return LeftoversAside(graft_of(simulated))


@pytest.fixture
def ends(simulated: Simulated, aside: LeftoversAside) -> Ends:
    """A container ends, and so many of its sockets are left."""

    def end(number: int, left: int) -> None:
        simulated.left[number] = left
        container = Container(number, "web", "/none", Transport.SWAP, 1, "web", ())
        with aside.closed_after(graft_of(simulated), container):
            pass

    return end


def graft_of(simulated: Simulated) -> Any:
    return SimpleNamespace(settings=None, endpoints=SimpleNamespace(listing=lambda: (), namespaces=simulated.open))


def test_a_container_that_has_left_nothing_gets_no_child(simulated: Simulated, ends: Ends) -> None:
    ends(1, 0)
    assert not simulated.children and not simulated.namespaces


def test_what_is_there_when_the_child_has_ended_gets_another_one(
    simulated: Simulated, aside: LeftoversAside, ends: Ends
) -> None:
    ends(1, 2)
    aside.go_on()
    assert simulated.children == {101: 1} and simulated.namespaces == 1
    simulated.end(101, left=1)
    aside.go_on()
    assert simulated.children == {102: 1}
    simulated.end(102)
    aside.go_on()
    assert not simulated.children and not simulated.namespaces


def test_new_ones_without_end_do_not_keep_it_busy_for_ever(
    simulated: Simulated, aside: LeftoversAside, ends: Ends
) -> None:
    ends(1, 1)
    for child in (101, 102, 103):
        simulated.end(child, left=1)
        aside.go_on()
    assert not simulated.children and not simulated.namespaces


def test_there_are_so_many_children_and_the_next_waits_for_one(
    simulated: Simulated, aside: LeftoversAside, ends: Ends
) -> None:
    for number in range(1, 10 * MOST_CHILDREN):
        ends(number, number % 2)
    assert len(simulated.children) == MOST_CHILDREN
    assert simulated.namespaces <= 2 * MOST_CHILDREN
    later = 2 * MOST_CHILDREN + 1
    simulated.end(101)
    aside.go_on()
    assert len(simulated.children) == MOST_CHILDREN and later in simulated.children.values()
