"""Runs calls that may never return in a child process, which can be left behind.

A system call that waits for a socket's lock cannot be interrupted, and its process cannot be killed. A process of a
container can keep such a lock for as long as it likes (by waiting for a page of memory under lock_sock()). So commands
make such calls in a child, and continue without it when there is no answer in time.

    command ── fork ──> child ── threads, each of which takes the next item: one at first, more while none finishes
      results <── pipe ───┘

One thread does many quick items one after the other; a thousand items that hang take a thousand threads, and do not
block the next item. (Only where the hanging call releases the interpreter's lock: ctypes does, the methods of
socket.socket do not all.) For commands that have a single thread.

graftd, which must not wait, asks a `Question`: one item, whose result it fetches when it is there.

pickle and queue are imported where they are used: every supervisor has this module, and few ever ask.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from graft.kernel import process

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Outcome = tuple[int, object, "BaseException | None"]

TIMEOUT = 5.0
"""Seconds without a new result after which no more are expected."""
LONGEST = 60.0
"""Seconds after which no more are expected, however steadily they come: a container may release a lock now and then."""
_STALL_TIME = 0.05  # seconds without a new result after which more threads are started
_MAX_THREADS = 2048
_STACK_SIZE = 512 << 10
_LENGTH = struct.Struct("=I")
_EXIT_TIMEOUT = 1.0  # seconds that the child may take to exit after it was killed


@dataclass(frozen=True, slots=True)
class HelperResult(Generic[ResultT]):
    """Results by the index of their items, and the process that still works on the other items (0: none)."""

    results: dict[int, ResultT]
    helper_pid: int


def run_each(
    work: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    timeout: float = TIMEOUT,
    keep_running: bool = False,
    longest: float = LONGEST,
    keep: Collection[int] = (),
    exit_timeout: float = _EXIT_TIMEOUT,
) -> HelperResult[ResultT]:
    """Run ``work`` on each item, in a child that has no descriptor of ours but ``keep``; results must be picklable.

    An item without a result hung, or was too late. With ``keep_running`` the child continues with those, for as long
    as it takes; otherwise it is killed, then or with this process, and exits when the kernel releases it, for which
    ``exit_timeout`` seconds are waited. Raises what ``work`` raised.
    """
    if not items:
        return HelperResult({}, 0)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    parent = 0 if keep_running else os.getpid()
    child = _forked(reader, writer)
    if child == 0:
        _run_child(work, items, writer, keep, parent)
    os.close(writer)
    results: dict[int, ResultT] = {}
    leave_running = False
    try:
        _receive(reader, len(items), timeout, time.monotonic() + longest, results)
        leave_running = keep_running and len(results) < len(items)
    finally:
        os.close(reader)
        if not leave_running:
            os.kill(child, signal.SIGKILL)
        has_exited = _wait_for_exit(child, 0 if leave_running else exit_timeout)
    return HelperResult(results, 0 if has_exited else child)


def run_one(work: Callable[[], ResultT], timeout: float = TIMEOUT) -> ResultT | None:
    """The result of ``work``, None if it hung. Raises what it raised."""
    return run_each(lambda _: work(), (None,), timeout).results.get(0)


class Question(Generic[ResultT]):
    """Runs ``work`` in such a child, which has the descriptors ``keep``, while the caller does something else. To be
    closed.
    """

    def __init__(self, work: Callable[[], ResultT], keep: Collection[int] = ()) -> None:
        self._reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writer, True)
        self._raw = bytearray()
        parent = os.getpid()
        self.child = _forked(self._reader, writer)
        if self.child == 0:
            _run_child(lambda _: work(), (None,), writer, keep, parent)
        os.close(writer)

    def answer(self) -> list[ResultT]:
        """The result, if it is there, as the only item. Raises what ``work`` raised, OSError where the child died."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reader, 1 << 16):
                self._raw += data
            if len(self._raw) < _LENGTH.size or len(self._raw) < _LENGTH.size + _LENGTH.unpack_from(self._raw)[0]:
                raise OSError("the process that was asked has died")
            from pickle import loads

            _, result, error = loads(self._raw[_LENGTH.size :])
            if error is not None:
                raise error
            return [result]
        return []

    def close(self) -> int:
        """Kill the child; returns its process id if it has not exited by now, else 0."""
        os.close(self._reader)
        os.kill(self.child, signal.SIGKILL)
        return 0 if _wait_for_exit(self.child, 0) else self.child


def _forked(*opened: int) -> int:
    """As os.fork(); closes those descriptors where no process can be made."""
    try:
        return os.fork()
    except OSError:
        for fd in opened:
            os.close(fd)
        raise


def _receive(reader: int, count: int, timeout: float, deadline: float, results: dict[int, ResultT]) -> None:
    """Read results until there are ``count``, or the child exits, or none arrives for ``timeout`` seconds, or the
    ``deadline`` is over.
    """
    from pickle import loads

    poll = select.poll()
    poll.register(reader, select.POLLIN)
    raw = bytearray()
    while len(results) < count and poll.poll(max(0.0, min(timeout, deadline - time.monotonic())) * 1000):
        data = os.read(reader, 1 << 16)
        if not data or time.monotonic() >= deadline:
            return
        raw += data
        while len(raw) >= _LENGTH.size and len(raw) >= (end := _LENGTH.size + _LENGTH.unpack_from(raw)[0]):
            index, result, error = loads(raw[_LENGTH.size : end])
            del raw[:end]
            if error is not None:
                raise error
            results[index] = result


def _wait_for_exit(child: int, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def _run_child(
    work: Callable[[ItemT], ResultT], items: Sequence[ItemT], writer: int, keep: Collection[int], parent: int
) -> NoReturn:
    """The child's side. ``parent``: to die with; 0: it may outlive it."""
    from pickle import dumps

    with contextlib.suppress(BaseException):
        if parent:
            process.die_with(parent)
        os.setsid()  # no ^C from the command's terminal
        process.close_all_but({writer, *keep})
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        process.set_process_name("graft-asks")
        for outcome in run_in_threads(work, items):
            raw = dumps(outcome)
            with contextlib.suppress(BrokenPipeError), open(writer, "wb", closefd=False) as pipe:
                pipe.write(_LENGTH.pack(len(raw)) + raw)
    os._exit(0)


def run_in_threads(work: Callable[[ItemT], object], items: Sequence[ItemT]) -> Iterator[Outcome]:
    """(index, result, error) of each item, in the order in which they finish. For the child."""
    from queue import Empty, SimpleQueue

    indexes = itertools.count()
    outcomes: SimpleQueue[Outcome] = SimpleQueue()

    def run_next_items() -> None:
        while (index := next(indexes)) < len(items):
            try:
                outcomes.put((index, work(items[index]), None))
            except BaseException as error:
                outcomes.put((index, None, _picklable(error)))

    threading.stack_size(_STACK_SIZE)
    threads = done = 0
    while done < len(items):
        with contextlib.suppress(RuntimeError):  # no more threads can be started
            for _ in range(min(max(threads, 1), _MAX_THREADS - threads, len(items) - done - threads)):
                threading.Thread(target=run_next_items, daemon=True).start()
                threads += 1
        with contextlib.suppress(Empty):
            while done < len(items):
                yield outcomes.get(timeout=_STALL_TIME)
                done += 1


def _picklable(error: BaseException) -> BaseException:
    from pickle import dumps, loads

    try:
        loads(dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error
