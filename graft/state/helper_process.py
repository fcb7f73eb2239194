"""Work that may never return, in a process that can be left behind.

A system call that waits for a lock which some container's process holds as long as it likes (lock_sock() while it
waits for a page of memory) cannot be interrupted, nor the process be killed that makes it. So commands make such
calls in a child, and go on without it when there is no answer.

    command ── fork ──> child ── threads, each of which takes the next item: one, and more of them while none gets done
       answers <── pipe ───┘

Several items that cost nothing are done by one thread, one after the other; a thousand that hang take a thousand
threads, and keep nobody from the next. (As long as they hang where the interpreter lets its other threads run:
ctypes sees to that, the methods of socket.socket do not all.) For processes with a single thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import queue
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from graft.kernel import process

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Answer = tuple[int, object, "BaseException | None"]

PATIENCE = 5.0
"""Seconds without any answer after which there will be none."""
_STALL = 0.05  # seconds without any answer after which more threads are tried
_MOST_THREADS = 2048
_STACK = 512 << 10
_LENGTH = struct.Struct("=I")
_DYING = 1.0  # seconds that a process may take to end after it was killed


@dataclass(frozen=True, slots=True)
class HelperResult(Generic[ResultT]):
    """Results by the numbers of their items, and the process that is still at work on the others (0: none)."""

    results: dict[int, ResultT]
    left_behind: int


def each(
    work: Callable[[ItemT], ResultT], items: Sequence[ItemT], patience: float = PATIENCE, finish: bool = False
) -> HelperResult[ResultT]:
    """``work`` on each item, in a child that has no descriptor of ours; results have to be picklable.

    An item without a result in what is returned is one that hung. With ``finish`` the child goes on with those, for as
    long as it takes; else it is killed, which ends it when the kernel lets go of it. Raises what ``work`` raised.
    """
    if not items:
        return HelperResult({}, 0)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _work(work, items, writer)
    os.close(writer)
    results: dict[int, ResultT] = {}
    kept = False
    try:
        _receive(reader, len(items), patience, results)
        kept = finish and len(results) < len(items)
    finally:
        os.close(reader)
        left = 0 if _has_ended(child, 0 if kept else _DYING, kill=not kept) else child
    return HelperResult(results, left)


def one(work: Callable[[], ResultT], patience: float = PATIENCE) -> ResultT | None:
    """What ``work`` gives, None where it hung. Raises what it raised."""
    return each(lambda _: work(), (None,), patience).results.get(0)


def _receive(reader: int, count: int, patience: float, results: dict[int, ResultT]) -> None:
    """Take answers until there are ``count``, or the child ends, or none comes for ``patience`` seconds."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    raw = bytearray()
    while len(results) < count and poll.poll(patience * 1000):
        data = os.read(reader, 1 << 16)
        if not data:
            return
        raw += data
        while len(raw) >= _LENGTH.size and len(raw) >= (end := _LENGTH.size + _LENGTH.unpack_from(raw)[0]):
            index, result, error = pickle.loads(raw[_LENGTH.size : end])
            del raw[:end]
            if error is not None:
                raise error
            results[index] = result


def _has_ended(child: int, patience: float, kill: bool) -> bool:
    if kill:
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + patience
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def _work(work: Callable[[ItemT], ResultT], items: Sequence[ItemT], writer: int) -> NoReturn:
    """The child's side."""
    with contextlib.suppress(BaseException):
        os.setsid()  # no ^C of the command's terminal
        process.close_all_but({writer})
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        process.set_process_name("graft-asks")
        for answer in _answers(work, items):
            raw = pickle.dumps(answer)
            with contextlib.suppress(BrokenPipeError), open(writer, "wb", closefd=False) as pipe:
                pipe.write(_LENGTH.pack(len(raw)) + raw)
    os._exit(0)


def _answers(work: Callable[[ItemT], object], items: Sequence[ItemT]) -> Iterator[Answer]:
    """(number, result, error) of each item, as they get done."""
    numbers = itertools.count()
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def serve() -> None:
        while (number := next(numbers)) < len(items):
            try:
                answers.put((number, work(items[number]), None))
            except BaseException as error:
                answers.put((number, None, _portable(error)))

    threading.stack_size(_STACK)
    threads = done = 0
    while done < len(items):
        with contextlib.suppress(RuntimeError):  # no more threads to be had
            for _ in range(min(max(threads, 1), _MOST_THREADS - threads, len(items) - done - threads)):
                threading.Thread(target=serve, daemon=True).start()
                threads += 1
        with contextlib.suppress(queue.Empty):
            while done < len(items):
                yield answers.get(timeout=_STALL)
                done += 1


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error
