"""The supervisor of one container: takes its trapped calls, and puts twins in the place of its sockets.

Theory of operation

    RECV ── look at the socket ── decide ──┬── RESUME: the call runs on the socket as it is
                                           ├── REFUSE: the call ends with an errno
                                           └── twin ── tag ── (bind) ── ADDFD ── the call runs, or has run

A bind that becomes an endpoint's is made here, on the twin, before the program has it: if it fails, the program gets
the kernel's errno and keeps the socket that it had. One in the container runs with the program's own rights. A
connect runs in the program's own thread, where it may block, be
interrupted or be left to finish in the background as the program likes. Both meet the hooks, which decide
on the kernel's copy of the address; nothing here can widen what a container may do.

One call at a time, and never a call that blocks; a second thread does nothing but wait for the end
(graft/swap/end_watcher.py). The program's thread sleeps meanwhile, and the kernel gives its core to this process and
back: what counts is how much is done between RECV and the answer, and how many system calls that takes. So the hooks
tell at once what can be told (graft/swap/desk.py), and what can wait is done later, for several at once.

The notification being worked on lies in a memory shared with the holder of the listener (`graft run`): a
supervisor that dies is started again, takes up the call that its forerunner left, and the container's calls wait
instead of failing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from _socket import socket as Socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from graft.datapath import layout
from graft.datapath.layout import PROBED_FLAGS, PROBED_OWNED
from graft.kernel.bpf import Map
from graft.kernel.pidfd import MemoryReader
from graft.kernel.seccomp import Listener, Notification, architecture
from graft.model.sockaddr import Sockaddr, parse_sockaddr
from graft.model.transport import Home
from graft.swap import descriptors, socket_copy
from graft.swap.decision import Action, Call, Decision, SocketFacts, decide
from graft.swap.desk import Desk, DeskAnswer
from graft.swap.end_watcher import EndWatcher
from graft.swap.processes import Process, Processes
from graft.swap.socket_pool import SocketPool
from graft.swap.unreported import UnreportedBinds

_IPPROTO_MPTCP = 262
_SOCKADDR_SIZE = 28  # sizeof(struct sockaddr_in6)
_AT_ONCE = 8  # replaced sockets that wait to be closed
_BIND, _LISTEN = Call.BIND, Call.LISTEN  # an attribute of an enum is no cheap thing to look up
_REFUSE, _RESUME, _TO_HOST = Action.REFUSE, Action.RESUME, Action.TO_HOST


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One line for whoever watches: what was asked, and what became of it."""

    call: Call
    address: Sockaddr | None
    decision: Decision
    error: int = 0


class TrappedCall(NamedTuple):
    """A trapped call and all that is known about it. ``held`` is our copy of its socket."""

    notification: Notification
    call: Call
    process: Process
    held: int
    address: Sockaddr | None
    answer: DeskAnswer


class Supervisor:
    """Serves one listener."""

    def __init__(
        self,
        tags: Map[ctypes.c_int32, layout.Tag],
        desk: Desk,
        pool: SocketPool,
        listener: Listener,
        tell: Callable[[LogEntry], None] | None = None,
    ) -> None:
        self._tags, self._desk, self._pool = tags, desk, pool
        self._listener = listener
        self._memory = MemoryReader(_SOCKADDR_SIZE)
        self._processes = Processes()
        self._tell = tell
        self._architecture, numbers = architecture()
        self._calls = {number: Call[name.upper()] for name, number in numbers.items()}
        self._references = 0
        self._unreported = UnreportedBinds()
        self._replaced: list[int] = []

    def calibrate(self) -> None:
        """Learn what the probe counts for a socket that one process has once and we have a copy of.

        One more where this process has a second thread: a system call holds its descriptors then.
        """
        sock = Socket()
        copy = os.dup(sock.fileno())
        try:
            self._references = self._desk.count_references(copy)
        finally:
            os.close(copy)
            sock.close()

    def handle(self, raw: bytes | bytearray, again: bool = False) -> None:
        """Serve one notification. An error of ours ends the program's call with an errno, never Graft.

        ``again``: an earlier supervisor may have got anywhere with it.
        """
        notification = Notification.unpack(raw)
        call = self._calls.get(notification.nr)
        if call is None or notification.arch != self._architecture:
            # A container's own profile (graft/oci/seccomp_profile.py) notifies 32-bit calls too: they stay at home.
            self._listener.resume(notification.id)
            return
        try:
            if (again or (self._unreported and self._was_unreported(notification))) and self._bound_already(
                notification, call
            ):
                self._listener.answer(notification.id)
            else:
                self._serve(notification, call)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                # The caller is gone, or its descriptor is: then the kernel itself has the right answer.
                self._listener.resume(notification.id)
            else:
                self._listener.answer(notification.id, error.errno or errno.EIO)
        except Exception:
            self._listener.answer(notification.id, errno.EIO)
            raise

    def _was_unreported(self, notification: Notification) -> bool:
        """Whether this may be the restart of a bind that was done, but that a signal kept from hearing so."""
        return self._unreported.take(notification.pid, notification.fd)

    def _bound_already(self, notification: Notification, call: Call) -> bool:
        """Whether the descriptor of this bind is the bound twin of just this address already."""
        address = self._address(notification)
        if call is not Call.BIND or address is None:
            return False
        _, held = self._processes.copy_of(notification.pid, notification.fd)
        try:
            tag = self._tags.peek(ctypes.c_int32(held))
        finally:
            os.close(held)
        if tag is None or not tag.bound_port:
            return False
        return (tag.family, bytes(tag.addr), tag.port) == (address.family, address.address, address.port)

    def _serve(self, notification: Notification, call: Call) -> None:
        unique, fd = notification.id, notification.fd
        try:
            process, held = self._processes.copy_of(notification.pid, fd)
        except OSError:
            self._listener.resume(unique)  # EBADF and the like: the kernel says it better
            return
        error = None
        try:
            address = None if call is _LISTEN else self._address(notification)
            answer = self._desk.ask(held, call, address, process.fdinfo, fd)
            if answer is not None:
                error = self._act(TrappedCall(notification, call, process, held, address, answer))
        finally:
            # Before the call goes on: while we have the old socket, the program's epoll instances still see it.
            if held not in self._replaced:
                os.close(held)
        if error is None:
            self._listener.resume(unique)
        elif not self._listener.answer(unique, error) and not error:
            self._unreported.add(notification.pid, fd)
        self._tidy()

    def _tidy(self) -> None:
        """What can wait until the program runs on, and is cheaper for several at once."""
        self._pool.refill()
        if len(self._replaced) >= _AT_ONCE:
            for old in self._replaced:
                os.close(old)
            self._replaced.clear()

    def _address(self, notification: Notification) -> Sockaddr | None:
        try:
            return parse_sockaddr(self._memory.read(notification.pid, notification.address, notification.size))
        except OSError:
            return None  # a bad pointer: the kernel's EFAULT

    def _act(self, swap: TrappedCall) -> int | None:
        """Decide, and carry it out. Gives the errno that the call ends with here (0: it has succeeded), None where
        it has to run.
        """
        facts = swap.answer.facts
        v6only = facts.family == 6 and socket_copy.is_v6only(swap.held, facts.protocol)
        decision = decide(swap.call, swap.address, facts, v6only)
        error: int | None = None
        if decision.action is _REFUSE:
            error = decision.error
        elif decision.action is not _RESUME:
            error = self._swap(swap, decision, v6only)
        if self._tell is not None:
            self._tell(LogEntry(swap.call, swap.address, decision, error or 0))
        return error

    def _swap(self, swap: TrappedCall, decision: Decision, v6only: bool) -> int | None:
        """Put a twin in the socket's place; give what `_act` does."""
        facts, (references, flags, probed, options, overflow) = swap.answer
        notification, held = swap.notification, swap.held
        if not probed & PROBED_FLAGS:
            flags = descriptors.descriptor_flags(swap.process.fdinfo, notification.fd)
            probed |= PROBED_OWNED
        names = socket_copy.options_set(self._desk.options) if options or overflow else ()
        error = None
        new = self._twin(decision, facts)
        try:
            socket_copy.copy_socket_state(
                new, held, flags, names, v6only or decision.v6only, bool(probed & PROBED_OWNED)
            )
            if swap.call is _BIND and decision.action is _TO_HOST:
                assert swap.address is not None
                error = self._bind(new, swap.address)
            if not error:
                number, attached = new.fileno(), None
                if descriptors.must_look(probed, references, self._references):
                    attached = descriptors.find(notification.pid, os.fstat(held).st_ino, notification.fd)
                self._listener.replace(notification.id, number, notification.fd, bool(flags & os.O_CLOEXEC))
                if attached is not None:
                    self._replace_others(swap, attached, number)
                elif not facts.local_port:
                    # Nobody has it now but us, nothing watches it, and it keeps no port: it can go later.
                    self._replaced.append(held)
        finally:
            new.close()
        return error

    def _twin(self, decision: Decision, facts: SocketFacts) -> Socket:
        if decision.action is _TO_HOST:
            return self._pool.take(Home.HOST, decision.netns, facts.family, facts.protocol)
        return self._pool.take(Home.CONTAINER, facts.container_netns, facts.family, facts.protocol)

    def _bind(self, sock: Socket, address: Sockaddr) -> int:
        """Bind the twin to what the program asked for; the hook makes it the endpoint. Gives an errno."""
        text = str(address.ip)
        if sock.family == socket_copy.AF_INET6 and address.family == 4:
            text = f"::ffff:{text}"
        try:
            sock.bind((text, address.port))
        except OSError as error:
            return error.errno or errno.EIO
        if sock.proto == _IPPROTO_MPTCP:
            self._complete_tag(sock)
        return 0

    def _complete_tag(self, sock: Socket) -> None:
        """What the hook after a bind does, which sees only an MPTCP socket's first subflow."""
        tag = self._tags.get(ctypes.c_int32(sock.fileno()))
        if tag is not None and tag.home == Home.HOST:
            tag.bound_port = sock.getsockname()[1]  # the real one: a supervisor is told no other
            self._tags.put(ctypes.c_int32(sock.fileno()), tag)

    def _replace_others(self, swap: TrappedCall, attached: descriptors.SocketReferences, new: int) -> None:
        """Put the twin wherever else the process has the old socket."""
        for copy in attached.copies:
            with contextlib.suppress(OSError):
                cloexec = bool(descriptors.descriptor_flags(swap.process.fdinfo, copy) & os.O_CLOEXEC)
                self._listener.replace(swap.notification.id, new, copy, cloexec)
        descriptors.register_again(attached.watches, new, swap.process.get_fd)


def serve(supervisor: Supervisor, listener: Listener, journal: mmap.mmap, holder: int) -> None:
    """Serve until the last process of the container is gone, or the holder (a pidfd) is.

    ``journal`` is shared with the holder: the notification at work, zero where there is none.
    """
    listener.wake_on_this_core()
    page = (ctypes.c_char * Listener.SIZE).from_buffer(journal)
    blank = bytes(Listener.SIZE)
    left = page.raw
    ending = EndWatcher(listener.fd, holder)
    with ending.watched():
        supervisor.calibrate()
        if left != blank and listener.is_valid(Notification.unpack(left).id):
            supervisor.handle(left, again=True)
        page.raw = blank
        while not ending.has_come:
            if listener.receive(page):
                supervisor.handle(page.raw)
                page.raw = blank
