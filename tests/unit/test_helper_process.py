"""Work that may hang, done by a helper process: each answer is returned, and the caller never waits for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from graft.state import helper_process
from tests.support.wait import PATIENCE, until


def work(item: int) -> tuple[int, int]:
    """Hangs for negative numbers."""
    if item < 0:
        threading.Event().wait()
    return item * 2, os.getpid()


def test_every_item_is_done_in_another_process() -> None:
    done = helper_process.each(work, range(1000))
    assert {number: result for number, (result, _) in done.results.items()} == {n: 2 * n for n in range(1000)}
    assert {pid for _, pid in done.results.values()} != {os.getpid()}
    assert done.left_behind == 0


def test_all_other_items_are_done_where_some_hang() -> None:
    items = [*range(-40, 0), *range(40)]
    done = helper_process.each(work, items, patience=5 * PATIENCE)
    assert {items[number] for number in done.results} == set(range(40))


def test_nothing_is_done_for_nothing() -> None:
    assert helper_process.each(work, ()).results == {}


def test_an_error_is_raised_in_the_caller() -> None:
    def fail(item: int) -> None:
        raise FileNotFoundError(2, "no such item")

    with pytest.raises(FileNotFoundError, match="no such item"):
        helper_process.each(fail, [1])


def test_an_error_that_cannot_be_pickled_is_raised_as_its_text() -> None:
    class Odd(Exception):
        pass

    def fail(item: int) -> None:
        raise Odd(item)

    with pytest.raises(RuntimeError, match="Odd"):
        helper_process.each(fail, [1])


def test_one_item_that_hangs_gives_none() -> None:
    assert helper_process.one(lambda: "answer") == "answer"
    assert helper_process.one(lambda: work(-1), patience=0.2) is None


def test_work_that_has_to_be_finished_continues_in_the_background(tmp_path: Path) -> None:
    def wait(path: Path) -> None:
        while not path.exists():
            time.sleep(0.01)
        path.with_name("done").touch()

    done = helper_process.each(wait, [tmp_path / "go"], patience=0.1, finish=True)
    assert not done.results and done.left_behind
    try:
        assert Path(f"/proc/{done.left_behind}/comm").read_text() == "graft-asks\n"
        assert os.waitpid(done.left_behind, os.WNOHANG) == (0, 0)
        (tmp_path / "go").touch()
        until("it is done", (tmp_path / "done").exists)
        until("the process ends", lambda: os.waitpid(done.left_behind, os.WNOHANG)[0] == done.left_behind)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(done.left_behind, signal.SIGKILL)


def test_the_helper_process_has_no_descriptor_of_the_caller() -> None:
    def open_ones(_: int) -> list[str]:
        return [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]

    with open(os.devnull):
        assert helper_process.each(open_ones, [1]).results == {0: ["/dev/null"] * 3}
