"""Whether the cgroups of the containers still exist, which graftd has to know a few times a second.

Whoever may list a folder of the cgroup tree can hold it. Then whoever looks a cgroup below it up waits, by its name or
by its id, if the kernel does not have the name in its cache (or not any more: others can use up the memory). So a child
opens the file cgroup.events of each container's cgroup, once, and passes the descriptor. While that is open the kernel
keeps the name, and a read of it says whether the cgroup was removed: it waits for nobody.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

from graft.errors import GraftError
from graft.kernel import cgroup
from graft.splice.event_loop import DAEMON, EventLoop
from graft.splice.jobs import Job, Stepwise
from graft.splice.questions import ask
from graft.state.records import Container

_ASK_AGAIN_SECONDS = 10.0


class Cgroups:
    """The cgroups of the containers that have a record. ``changed`` is called when more is known about one."""

    def __init__(self, loop: EventLoop, changed: Callable[[], None]) -> None:
        self._loop, self._changed = loop, changed
        self._events: dict[int, int] = {}
        """The descriptor of cgroup.events by the container's number."""
        self._gone: set[int] = set()
        self._asking: dict[int, Job | None] = {}
        """The question of each that is not known: None until it is asked again."""
        self._unanswered: set[int] = set()
        self._waiting: dict[int, list[Callable[[], None]]] = {}

    def update(self, records: Mapping[int, Container]) -> None:
        """Ask about containers that are new, and forget those without a record."""
        for number in [number for number in (*self._events, *self._gone, *self._asking) if number not in records]:
            self._forget(number)
        for number, container in records.items():
            if number not in self._events and number not in self._gone and number not in self._asking:
                self._ask(container)

    def gone(self, numbers: Collection[int]) -> set[int]:
        """Those of these containers whose cgroup was removed."""
        for number in [number for number in numbers if self._was_removed(number)]:
            os.close(self._events.pop(number))
            self._gone.add(number)
        return self._gone.intersection(numbers)

    def _was_removed(self, number: int) -> bool:
        events = self._events.get(number)
        return events is not None and cgroup.is_removed(events)

    def is_pending(self, number: int) -> bool:
        """Whether it is being found out, for the first time, if the container's cgroup exists. (Where nobody answers,
        because a folder is held, it counts as there; that is asked again.)
        """
        return number in self._asking and number not in self._unanswered

    def when_known(self, number: int, call: Callable[[], None]) -> None:
        """Make ``call`` when that is not pending any more."""
        self._waiting.setdefault(number, []).append(call)

    def _ask(self, container: Container) -> None:
        number = container.id
        self._asking[number] = Job(
            self._loop, DAEMON, self._open(container), lambda error: self._answered(container, error)
        )

    def _open(self, container: Container) -> Stepwise[None]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            work = partial(_send_events, container.cgroup_path, container.cgroup_id, theirs)
            if not (yield from ask(container.cgroup, work, {theirs.fileno()})):
                self._gone.add(container.id)
                return
            received = socket.recv_fds(ours, 1, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)[1]
        if not received:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self._events[container.id] = received[0]

    def _answered(self, container: Container, error: BaseException | None) -> None:
        if isinstance(error, GraftError | OSError):
            self._unanswered.add(container.id)
            self._asking[container.id] = None
            self._loop.after(_ASK_AGAIN_SECONDS, partial(self._ask_again, container))
        else:
            self._asking.pop(container.id, None)
            self._unanswered.discard(container.id)
        self._call_waiting(container.id)

    def _ask_again(self, container: Container) -> None:
        if container.id in self._asking:
            self._ask(container)

    def _call_waiting(self, number: int) -> None:
        for call in (*self._waiting.pop(number, ()), self._changed):
            call()

    def _forget(self, number: int) -> None:
        job = self._asking.pop(number, None)
        if job is not None:
            job.stop()
        self._gone.discard(number)
        self._unanswered.discard(number)
        events = self._events.pop(number, None)
        if events is not None:
            os.close(events)
        self._call_waiting(number)

    def close(self) -> None:
        """Close what is open."""
        self._waiting.clear()
        for number in (*self._events, *self._asking):
            with contextlib.suppress(OSError):
                self._forget(number)


def _send_events(path: Path, number: int, outbox: socket.socket) -> bool:
    """In the child: open a cgroup's cgroup.events and send its descriptor. False where there is no such cgroup."""
    try:
        events = cgroup.open_events(path, number)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return False
    socket.send_fds(outbox, [b"."], [events])
    return True
