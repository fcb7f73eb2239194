"""Work that may hang: results arrive, items that hang have none, and nothing waits for them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from graft.errors import NotFoundError
from graft.state import helper_process
from tests.support.wait import PATIENCE, until


def work(item: int) -> tuple[int, int]:
    """Hangs for negative numbers."""
    if item < 0:
        threading.Event().wait()
    return item * 2, os.getpid()


def test_every_item_is_done_in_another_process() -> None:
    done = helper_process.run_each(work, range(1000))
    assert {number: result for number, (result, _) in done.results.items()} == {n: 2 * n for n in range(1000)}
    assert {pid for _, pid in done.results.values()} != {os.getpid()}
    assert done.helper_pid == 0


def test_all_other_items_are_done_where_some_hang() -> None:
    items = [*range(-40, 0), *range(40)]
    done = helper_process.run_each(work, items, timeout=5 * PATIENCE)
    assert {items[number] for number in done.results} == set(range(40))


def test_items_that_are_done_one_after_the_other_are_not_waited_for_for_ever() -> None:
    """A container that has thousands of locks, and releases one of them just before each timeout."""
    lock = threading.Lock()

    def take_turns(item: int) -> int:
        with lock:
            time.sleep(0.02)
            return item

    done = helper_process.run_each(take_turns, range(5000), timeout=5 * PATIENCE, longest=1.0)
    assert 0 < len(done.results) < 5000


def test_nothing_is_done_for_nothing() -> None:
    assert helper_process.run_each(work, ()).results == {}


def test_an_error_is_raised_in_the_caller() -> None:
    def fail(item: int) -> None:
        raise FileNotFoundError(2, "no such item")

    with pytest.raises(FileNotFoundError, match="no such item"):
        helper_process.run_each(fail, [1])


def test_an_error_that_cannot_be_pickled_arrives_as_its_text() -> None:
    class Odd(Exception):
        pass

    def fail(item: int) -> None:
        raise Odd(item)

    with pytest.raises(RuntimeError, match="Odd"):
        helper_process.run_each(fail, [1])


def test_one_item_that_hangs_gives_none() -> None:
    assert helper_process.run_one(lambda: "answer") == "answer"
    assert helper_process.run_one(lambda: work(-1), timeout=0.2) is None


def test_with_keep_running_the_child_continues(tmp_path: Path) -> None:
    def wait(path: Path) -> None:
        while not path.exists():
            time.sleep(0.01)
        path.with_name("done").touch()

    done = helper_process.run_each(wait, [tmp_path / "go"], timeout=0.1, keep_running=True)
    assert not done.results and done.helper_pid
    try:
        until("it has its name", lambda: Path(f"/proc/{done.helper_pid}/comm").read_text() == "graft-asks\n")
        assert os.waitpid(done.helper_pid, os.WNOHANG) == (0, 0)
        (tmp_path / "go").touch()
        until("it is done", (tmp_path / "done").exists)
        until("the process ends", lambda: os.waitpid(done.helper_pid, os.WNOHANG)[0] == done.helper_pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(done.helper_pid, signal.SIGKILL)


def test_the_helper_process_has_no_descriptor_of_the_caller() -> None:
    def open_ones(_: int) -> list[str]:
        return [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]

    with open(os.devnull):
        assert helper_process.run_each(open_ones, [1]).results == {0: ["/dev/null"] * 3}


def answered(question: helper_process.Question[str]) -> str:
    """The answer to a question, which is closed."""
    try:
        while not (found := question.answer()):
            time.sleep(0.005)
        return found[0]
    finally:
        question.close()


def test_a_question_is_answered_while_the_asker_does_something_else() -> None:
    def slow() -> str:
        time.sleep(0.2)
        return "x" * 1_000_000

    start = time.monotonic()
    question = helper_process.Question(slow)
    assert question.answer() == []
    assert time.monotonic() - start < 0.2 * PATIENCE
    assert answered(question) == "x" * 1_000_000


def test_what_a_question_raises_is_raised_and_a_child_that_died_is_an_error() -> None:
    def fail() -> str:
        raise NotFoundError("gone", "here")

    def die() -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    with pytest.raises(NotFoundError, match="gone"):
        answered(helper_process.Question(fail))
    with pytest.raises(OSError, match="has died"):
        answered(helper_process.Question(die))


def test_the_child_of_a_question_that_hangs_is_killed() -> None:
    question = helper_process.Question(lambda: threading.Event().wait())
    assert question.answer() == []
    if question.close():
        assert os.waitpid(question.child, 0)[0] == question.child
