"""A container's listeners are found in steps: however many there are, one step is short. Its cgroups and processes are
asked of a child, and only about what is new.
"""

from __future__ import annotations

import itertools
import os
import select
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from graft.errors import NotFoundError
from graft.kernel import cgroup, netns
from graft.kernel.sockdiag import ListeningSocket
from graft.model.settings import Settings
from graft.splice import questions
from graft.splice.container_list import ContainerList
from graft.splice.event_loop import EventLoop
from graft.splice.jobs import Job
from graft.splice.listeners import ContainerCgroups, cgroup_ids, collect_datagram_sockets, collect_listeners
from graft.splice.namespaces import find_process
from graft.splice.publication import PublicationPlan
from graft.state import records
from graft.state.left_children import LeftChildren
from graft.state.records import Container

T = TypeVar("T")


def finished(steps: Generator[float | None, None, T]) -> tuple[T, int]:
    """The result of work in steps, and how many those were."""
    for count in itertools.count():
        try:
            time.sleep(next(steps) or 0)
        except StopIteration as end:
            return end.value, count
    raise AssertionError("not reached")


class Storm:
    """A namespace with very many listeners, as the kernel lists them."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces

    def listeners(self, _storage: int | None = None) -> Generator[list[ListeningSocket], None, None]:
        for number in range(self.pieces):
            yield [
                ListeningSocket(4, bytes(16), port, False, 7, 0) for port in range(number * 64 + 1, number * 64 + 65)
            ]

    def datagram_sockets(self) -> Iterator[list[ListeningSocket]]:
        return iter(())


def container(path: Path, number: int = 1, **more: object) -> Container:
    return Container(number, "c", str(path), "splice", 1, "p", (), **more)  # type: ignore[arg-type]


def test_few_listeners_are_added_in_a_step() -> None:
    asked: list[int] = []

    def lookup(_protocol: int, _family: int, _address: bytes, port: int) -> None:
        asked.append(port)

    storm, plan, loop = Storm(10), PublicationPlan({7}, lookup, 10), EventLoop(lambda: None)
    steps, before = collect_listeners(storm, plan, loop, {80}), 0  # type: ignore[arg-type]
    for _ in steps:
        assert len(asked) - before <= 16
        before = len(asked)
    assert asked == [port for port in range(1, 641) if port != 80]


class LongLook(Storm):
    """One that takes the kernel long, because of other sockets in its tables."""

    def datagram_sockets(self) -> Iterator[list[ListeningSocket]]:
        for _ in range(self.pieces):
            until = time.thread_time() + 0.005
            while time.thread_time() < until:
                pass
            yield []


def held_for(blame: bool, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a container waits for a long look at its sockets, while another one has something to do."""
    loop, ended, held = EventLoop(lambda: None), list[object](), False
    if not blame:
        monkeypatch.setattr(loop, "blame", lambda *_: None)
    reader, writer = os.pipe()
    os.write(writer, b"x")
    loop.watch(reader, select.EPOLLIN, lambda _mask: None, 2)
    plan = PublicationPlan({7}, lambda *_: None, 10)
    Job(loop, 1, collect_datagram_sockets(LongLook(3), plan, loop), ended.append)  # type: ignore[arg-type]
    while not ended:
        loop.turn()
        held = held or loop.waits(1) > 0
    loop.shut_down()
    os.close(reader)
    os.close(writer)
    return held


def test_a_long_look_at_its_sockets_is_no_slow_call_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not held_for(True, monkeypatch)


def test_control_if_it_was_one_the_container_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert held_for(False, monkeypatch)


def test_the_tree_of_cgroups_is_listed_when_a_listener_is_in_one_that_was_not_seen_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below" / "that").mkdir(parents=True)
    every = {Path(folder).stat().st_ino for folder, _, _ in os.walk(tmp_path)}
    root, inner = tmp_path.stat().st_ino, (tmp_path / "below" / "that").stat().st_ino
    known = ContainerCgroups(tmp_path, root, pytest.fail)
    assert known.own == {root}
    assert not finished(known.look_up(()))[0]
    assert finished(known.look_up({inner, 1}))[0]
    assert known.own == every
    monkeypatch.setattr(questions, "Question", lambda _: pytest.fail("asked again"))
    assert not finished(known.look_up({1}))[0]


def test_where_the_tree_cannot_be_listed_what_was_known_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "_TIMEOUT", 0.1)
    monkeypatch.setattr(questions, "_left", LeftChildren())
    monkeypatch.setattr("graft.splice.listeners.cgroup_ids", lambda *_: time.sleep(60))
    root = tmp_path.stat().st_ino
    lines: list[str] = []
    known = ContainerCgroups(tmp_path, root, lines.append)
    changed, steps = finished(known.look_up({1}))
    assert steps > 5
    assert not changed
    assert known.own == {root}
    assert lines == [known.problem]  # by the container's log, which has a limit
    assert "holds the directory" in known.problem
    assert finished(known.look_up({1}))[1] == 0  # not again for a while


def test_another_cgroup_at_the_same_path_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        cgroup_ids(tmp_path, 1)
    with pytest.raises(NotFoundError):
        cgroup_ids(tmp_path / "gone", 0)


def test_a_tree_is_read_no_further_than_its_caller_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (tmp_path / f"{number}" / "below").mkdir(parents=True)
    looked: list[object] = []
    real = os.scandir

    def scandir(path: Path) -> object:
        looked.append(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    tree = cgroup.tree(tmp_path)
    assert next(tree) == tmp_path
    assert not looked
    assert len(list(itertools.islice(tree, 5))) == 5
    assert looked == [tmp_path]


def test_a_tree_deeper_than_recursion_goes_is_walked(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(1500):
        deep = deep / "d"
        deep.mkdir()
    assert sum(1 for _ in cgroup.tree(tmp_path)) == 1501
    while deep != tmp_path:  # shutil.rmtree, which pytest would use, does recurse
        deep.rmdir()
        deep = deep.parent


def test_a_process_is_found_by_its_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cookie(pid: int) -> int:
        if pid == 3:
            raise ProcessLookupError
        return pid * 100

    monkeypatch.setattr(netns, "cookie", cookie)
    (tmp_path / "below").mkdir()
    (tmp_path / "cgroup.procs").write_text("3\n4\n")
    (tmp_path / "below" / "cgroup.procs").write_text("5\n")
    assert [find_process(tmp_path, wanted) for wanted in (300, 400, 500)] == [0, 4, 5]


def test_records_are_read_again_only_when_one_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(Path("/proc/self/ns/net"), tmp_path / "pins", tmp_path, tmp_path / "state", tmp_path, "graft-x")
    listed = ContainerList(settings)
    assert listed.current() == {}
    records.save(settings, container(tmp_path))
    assert list(listed.current()) == [1]
    folder = records.folder_of(settings)
    os.utime(folder, (1, 1))
    assert list(listed.current()) == [1]
    monkeypatch.setattr(records, "read_all", lambda _: pytest.fail("read again"))
    assert list(listed.current()) == [1]
    monkeypatch.undo()
    records.save(settings, container(tmp_path, 2))
    assert list(listed.current()) == [1, 2]
    records.save(settings, container(tmp_path, 3))  # within the same tick of the clock, perhaps
    assert list(listed.current()) == [1, 2, 3]
