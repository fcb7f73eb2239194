"""The event loop: the work of one container keeps no other waiting."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from graft.errors import NotFoundError
from graft.splice import event_loop
from graft.splice.background import Background
from graft.splice.container_service import SCAN_SECONDS, ContainerService
from graft.splice.event_loop import EventLoop
from graft.splice.jobs import Job, Stepwise
from graft.splice.log import FailureLog
from graft.splice.slow_calls import SlowCalls
from graft.splice.turns import Turns

BUSY, QUIET = 1, 2


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop(lambda: None)
    yield made
    made.shut_down()


def take_a_millisecond() -> None:
    until = time.monotonic() + 0.001
    while time.monotonic() < until:
        pass


class Worker:
    """Work without end, of a millisecond a turn."""

    def __init__(self, loop: EventLoop) -> None:
        self.loop, self.turns = loop, 0
        loop.later(self.work, BUSY)

    def work(self) -> None:
        take_a_millisecond()
        self.turns += 1
        self.loop.later(self.work, BUSY)


def test_an_event_waits_for_few_of_another_owners_thousand_calls(loop: EventLoop) -> None:
    workers = [Worker(loop) for _ in range(1000)]
    served: list[int] = []
    reader, writer = os.pipe()
    loop.watch(reader, select.EPOLLIN | select.EPOLLET, served.append, QUIET)
    loop.turn()
    before = sum(worker.turns for worker in workers)
    os.write(writer, b"x")
    while not served:
        loop.turn()
    assert sum(worker.turns for worker in workers) - before <= 3
    os.close(reader)
    os.close(writer)


def test_of_many_events_at_once_another_owners_is_not_served_last(loop: EventLoop) -> None:
    count, served = 0, 0

    def busy(_mask: int) -> None:
        nonlocal count
        count += 1
        take_a_millisecond()

    def quiet(_mask: int) -> None:
        nonlocal served
        served = count + 1

    pipes = [os.pipe() for _ in range(301)]
    for reader, writer in pipes:
        os.write(writer, b"x")
        is_last = reader == pipes[-1][0]
        loop.watch(reader, select.EPOLLIN | select.EPOLLET, quiet if is_last else busy, QUIET if is_last else BUSY)
    while not served:
        loop.turn()
    assert served <= 10
    while count < 300:
        loop.turn()
    for fds in pipes:
        for fd in fds:
            os.close(fd)


class Slow:
    """An owner with events without end, each of which takes five milliseconds."""

    def __init__(self, loop: EventLoop) -> None:
        self.served = 0
        self.reader, self.writer = os.pipe()
        os.write(self.writer, b"x")
        loop.watch(self.reader, select.EPOLLIN, self.serve, BUSY)

    def serve(self, _mask: int) -> None:
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            pass
        self.served += 1

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


def turn_for(loop: EventLoop, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        loop.turn()


def test_an_owner_whose_calls_are_slow_waits_ten_times_as_long_while_another_is_active(loop: EventLoop) -> None:
    slow, served = Slow(loop), list[int]()
    reader, writer = os.pipe()
    os.write(writer, b"x")
    loop.watch(reader, select.EPOLLIN, served.append, QUIET)
    turn_for(loop, 0.55)
    assert 1 <= slow.served <= 11
    assert len(served) > 1000
    os.close(reader)
    os.close(writer)
    slow.close()


def test_an_owner_whose_calls_are_slow_waits_for_nobody_who_has_nothing_to_do(loop: EventLoop) -> None:
    slow = Slow(loop)
    start = time.monotonic()
    while slow.served < 40:
        loop.turn()
    assert time.monotonic() - start < 1.2  # 0.2 s, and ten times that if it waited
    slow.close()


def test_an_owner_waits_ten_times_as_long_however_long_its_call_was() -> None:
    turns = Turns()
    calls = SlowCalls(turns)
    calls.note(BUSY, 20.0, now := time.monotonic())
    assert turns.held[BUSY] - now == pytest.approx(200, abs=1)
    calls.close()


def test_a_slow_call_that_is_nobodys_makes_nobody_wait() -> None:
    turns = Turns()
    calls = SlowCalls(turns)
    calls.note(BUSY, 20.0, time.monotonic(), event_loop.nobody)
    assert not turns.held and not calls.owners
    calls.close()


def test_the_time_of_a_slow_call_makes_nobody_else_idle() -> None:
    turns = Turns()
    calls = SlowCalls(turns)
    now = time.monotonic()
    calls.active[QUIET] = now - 20.1
    calls.note(BUSY, 20.0, now)
    calls.turn(now)
    assert BUSY in turns.held
    calls.turn(now + 1)
    assert BUSY not in turns.held
    calls.close()


def test_what_a_slow_owner_closes_is_closed_in_its_turns(loop: EventLoop) -> None:
    ends = [socket.socketpair() for _ in range(2)]
    for one, _ in ends:
        loop.watch(one.fileno(), select.EPOLLIN, lambda _mask: None, BUSY)
    reader, writer = os.pipe()
    os.write(writer, b"x")
    loop.watch(reader, select.EPOLLIN, lambda _mask: None, QUIET)
    loop.turn()

    def work() -> None:
        take_a_millisecond()
        take_a_millisecond()
        take_a_millisecond()
        for one, _ in ends:
            loop.close(one, BUSY)

    loop.later(work, BUSY)
    loop.turn()
    loop.turn()
    assert [one.fileno() for one, _ in ends] != [-1, -1]
    turn_for(loop, 0.2)
    assert [one.fileno() for one, _ in ends] == [-1, -1]
    for _, other in ends:
        other.close()
    os.close(reader)
    os.close(writer)


def test_a_call_that_is_asked_for_again_before_it_is_made_is_made_once(loop: EventLoop) -> None:
    made: list[int] = []

    def call() -> None:
        made.append(1)

    for _ in range(5):
        loop.later(call, BUSY)
    loop.turn()
    assert made == [1]


def test_a_call_that_fails_stops_no_other(loop: EventLoop, capfd: pytest.CaptureFixture[str]) -> None:
    made: list[int] = []
    loop.later(lambda: [][0], BUSY)
    loop.later(lambda: made.append(1), BUSY)
    loop.turn()
    loop.turn()
    assert made == [1]
    assert "IndexError" in capfd.readouterr().err


def test_failures_that_come_again_and_again_do_not_fill_the_log(
    loop: EventLoop, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_loop, "log_failure", FailureLog())

    def fail() -> None:
        raise ValueError

    for _ in range(50):
        loop.later(fail)
        loop.turn()
    assert capfd.readouterr().err.count("Traceback") == FailureLog.LINES


def test_the_pause_after_a_container_that_cannot_be_served_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    service: Any = ContainerService.__new__(ContainerService)
    service.container = SimpleNamespace(name="c")
    resources = SimpleNamespace(container_count=1, kept=SimpleNamespace(close_untaken=lambda _: None))
    service._context = SimpleNamespace(daemon_resources=resources)
    service._relays, service._failures, service._problem, service._log = None, 0, "", lambda _text: None
    service._scan_callbacks, service._next_scan_callbacks = [], []
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    pauses = []
    for _ in range(12):
        service._job = SimpleNamespace(spent=0.0)
        service._scanned(OSError("again"))
        pauses.append(service._due)
    assert pauses == sorted(pauses) and pauses[0] < 0.5 and pauses[4] > 5 and pauses[-1] == 10
    service._job, service._relays = SimpleNamespace(spent=0.0), object()
    service._scanned(None)
    assert service._due == SCAN_SECONDS


def test_what_is_due_is_called_in_its_owners_turns(loop: EventLoop) -> None:
    made: list[float] = []
    start = time.monotonic()
    loop.after(0.02, lambda: made.append(time.monotonic() - start), QUIET)
    while not made:
        loop.turn()
    assert made[0] >= 0.02


def test_an_event_that_waits_is_not_served_when_its_descriptor_is_closed(loop: EventLoop) -> None:
    served: list[int] = []
    reader, writer = os.pipe()
    loop.watch(reader, select.EPOLLIN, served.append, QUIET)
    os.write(writer, b"x")
    loop.later(lambda: loop.unwatch(reader), BUSY)  # in the turn in which the event is fetched, and before it
    loop.turn()
    loop.turn()
    assert not served
    os.close(reader)
    os.close(writer)


def test_a_job_makes_one_step_a_turn_and_says_how_it_ended(loop: EventLoop) -> None:
    steps: list[int] = []
    ended: list[BaseException | None] = []

    def work() -> Stepwise[None]:
        for number in range(3):
            steps.append(number)
            take_a_millisecond()
            yield

    job = Job(loop, BUSY, work(), ended.append)
    loop.turn()
    assert steps == [0]
    while not ended:
        loop.turn()
    assert (steps, ended) == ([0, 1, 2], [None])
    assert job.spent >= 0.003


def test_a_job_that_fails_says_so(loop: EventLoop) -> None:
    ended: list[BaseException | None] = []

    def work() -> Stepwise[None]:
        yield
        raise NotFoundError("gone")

    Job(loop, BUSY, work(), ended.append)
    while not ended:
        loop.turn()
    assert isinstance(ended[0], NotFoundError)


def test_a_job_that_is_stopped_tidies_up_and_says_nothing(loop: EventLoop) -> None:
    ended: list[BaseException | None] = []
    tidied: list[int] = []

    def work() -> Stepwise[None]:
        try:
            while True:
                yield
        finally:
            tidied.append(1)

    job = Job(loop, BUSY, work(), ended.append)
    loop.turn()
    job.stop()
    loop.turn()
    assert (tidied, ended) == ([1], [])


def test_a_call_that_blocks_in_the_background_does_not_hold_up_the_loop(loop: EventLoop) -> None:
    background = Background(loop)
    gate = threading.Event()
    results: list[object] = []
    background.run(gate.wait, lambda result, error: results.append((result, error)))
    turned: list[int] = []
    loop.later(lambda: turned.append(1), QUIET)
    loop.turn()
    assert turned == [1]
    assert not results
    gate.set()
    while not results:
        loop.turn()
    assert results == [(True, None)]


def test_an_error_in_the_background_is_reported_in_the_loop(loop: EventLoop) -> None:
    background = Background(loop)
    results: list[BaseException | None] = []
    background.run(lambda: os.stat("/nowhere"), lambda _, error: results.append(error))
    with contextlib.suppress(IndexError):
        while not results:
            loop.turn()
    assert isinstance(results[0], FileNotFoundError)


def test_a_closed_socket_is_not_heard_of_though_another_process_has_it(loop: EventLoop) -> None:
    """Its number may be another socket's by then. epoll forgets a socket by itself only when nobody has it any more."""
    loop.shares_sockets = True
    ours, peer = socket.socketpair()
    with peer, contextlib.ExitStack() as stack:
        stack.callback(os.close, os.dup(ours.fileno()))
        number = ours.fileno()
        heard: list[int] = []
        loop.watch(number, select.EPOLLIN | select.EPOLLET, heard.append)
        loop.close(ours, BUSY)
        loop.turn()
        other, far = socket.socketpair()
        with other, far:
            assert other.fileno() == number
            loop.watch(number, select.EPOLLIN | select.EPOLLET, heard.append)
            peer.send(b"to the one that is closed")
            loop.tick_soon()
            loop.turn()
            assert heard == []
            far.send(b"to the one that is there")
            loop.tick_soon()
            loop.turn()
            assert heard
