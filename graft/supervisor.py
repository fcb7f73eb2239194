"""The supervisor of one container: takes its trapped calls, and puts twins in the place of its sockets.

Theory of operation

    RECV ── look at the socket ── decide ──┬── RESUME: the call runs on the socket as it is
                                           ├── REFUSE: the call ends with an errno
                                           └── twin ── tag ── (bind) ── ADDFD ── the call runs, or has run

A bind is made here, on the twin, before the program has it: if it fails, the program gets the kernel's errno
and keeps the socket that it had. A connect runs in the program's own thread, where it may block, be
interrupted or be left to finish in the background as the program likes. Both meet the hooks, which decide
on the kernel's copy of the address; nothing here can widen what a container may do.

One thread, one call at a time, and never a call that blocks. The notification being worked on lies in a
memory shared with the holder of the listener (`graft run`): a supervisor that dies is started again, takes
up the call that its forerunner left, and the container's calls wait instead of failing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
from _socket import socket as Socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from graft import carry, layout, twin
from graft.decision import Action, Call, Decision, Facts, Sockaddr, decide, parse_sockaddr
from graft.desk import Descriptor, Desk
from graft.kernel import netns
from graft.kernel.bpf import Map
from graft.kernel.pidfd import MemoryReader
from graft.kernel.seccomp import Listener, Notification, architecture
from graft.layout import PROBED_FLAGS, PROBED_OWNED, Home
from graft.processes import Process, Processes

_IPPROTO_MPTCP = 262
_SOCKADDR_SIZE = 28  # sizeof(struct sockaddr_in6)


@dataclass(frozen=True, slots=True)
class Told:
    """One line for whoever watches: what was asked, and what became of it."""

    call: Call
    address: Sockaddr | None
    decision: Decision
    error: int = 0


class Swap(NamedTuple):
    """A trapped call and all that is known about it. ``held`` is our copy of its socket, ``fd`` its own number."""

    notification: Notification
    call: Call
    process: Process
    fd: int
    held: int
    address: Sockaddr | None
    facts: Facts
    descriptor: Descriptor


class Namespaces:
    """Puts the calling thread where a twin is to be made. Its home is the host's namespace."""

    def __init__(self, home: Path, paths: Callable[[int], Path | None]) -> None:
        self._home = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
        netns.setns(self._home)
        self.home_cookie = netns.cookie()
        self._paths = paths

    @contextlib.contextmanager
    def inside(self, cookie: int) -> Iterator[None]:
        """In the namespace of that cookie. Raises OSError(ENONET) where it cannot be found any more."""
        if cookie == self.home_cookie:
            yield
            return
        path = self._paths(cookie)
        if path is None:
            raise OSError(errno.ENONET, os.strerror(errno.ENONET))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            netns.setns(fd)
        finally:
            os.close(fd)
        try:
            if netns.cookie() != cookie:
                raise OSError(errno.ENONET, os.strerror(errno.ENONET))
            yield
        finally:
            netns.setns(self._home)


class Spares:
    """Twins made ahead, while the program runs on: making a socket is a tenth of a swap."""

    def __init__(self, tag: Callable[[Socket, Home], None]) -> None:
        self._tag = tag
        self._made: dict[tuple[int, int], Socket] = {}
        self._taken: tuple[int, int] | None = None

    def take(self, family: int, protocol: int) -> Socket:
        """A socket of the host's namespace, tagged as host-homed. Raises OSError."""
        self._taken = (family, protocol)
        spare = self._made.pop(self._taken, None)
        return self._make(family, protocol) if spare is None else spare

    def refill(self) -> None:
        """Have one ready like the last one that was taken."""
        if self._taken is not None:
            with contextlib.suppress(OSError):
                self._made[self._taken] = self._make(*self._taken)
            self._taken = None

    def _make(self, family: int, protocol: int) -> Socket:
        made = twin.make(family, protocol)
        try:
            self._tag(made, Home.HOST)
        except OSError:
            made.close()
            raise
        return made


class Supervisor:
    """Serves one listener."""

    def __init__(
        self,
        tags: Map[ctypes.c_int32, layout.Tag],
        desk: Desk,
        container: int,
        listener: Listener,
        namespaces: Namespaces,
        tell: Callable[[Told], None] | None = None,
    ) -> None:
        self._tags, self._desk, self._container = tags, desk, container
        self._listener = listener
        self._namespaces = namespaces
        self._memory = MemoryReader(_SOCKADDR_SIZE)
        self._processes = Processes()
        self._spares = Spares(self._tag)
        self._tell = tell
        self._architecture, numbers = architecture()
        self._calls = {number: Call[name.upper()] for name, number in numbers.items()}
        self._tag_key = ctypes.c_int32()
        self._home_tags = [layout.Tag(container=container, home=home) for home in Home]
        self._references = self._expected_references()
        self._unheard: set[tuple[int, int]] = set()

    def _expected_references(self) -> int:
        """What the probe counts for a socket that one process has once and we have a copy of."""
        sock = twin.make(4, 0)
        copy = os.dup(sock.fileno())
        try:
            return self._desk.count_references(copy)
        finally:
            os.close(copy)
            sock.close()

    def handle(self, raw: bytes | bytearray, again: bool = False) -> None:
        """Serve one notification. An error of ours ends the program's call with an errno, never Graft.

        ``again``: an earlier supervisor may have got anywhere with it.
        """
        notification = Notification.unpack(raw)
        if notification.arch != self._architecture or notification.nr not in self._calls:
            # A container's own profile (graft/runtime/seccomp.py) notifies 32-bit calls too: they stay at home.
            self._listener.resume(notification.id)
            return
        try:
            if (again or (self._unheard and self._was_unheard(notification))) and self._bound_already(notification):
                self._listener.answer(notification.id)
            else:
                self._serve(notification)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                # The caller is gone, or its descriptor is: then the kernel itself has the right answer.
                self._listener.resume(notification.id)
            else:
                self._listener.answer(notification.id, error.errno or errno.EIO)
        except Exception:
            self._listener.answer(notification.id, errno.EIO)
            raise

    def _was_unheard(self, notification: Notification) -> bool:
        """Whether this may be the restart of a bind that was done, but that a signal kept from hearing so."""
        caller = _caller(notification)
        if caller not in self._unheard:
            return False
        self._unheard.discard(caller)
        return True

    def _bound_already(self, notification: Notification) -> bool:
        """Whether the descriptor of this bind is the bound twin of just this address already."""
        address = self._address(notification)
        if self._calls[notification.nr] is not Call.BIND or address is None:
            return False
        _, held = self._processes.copy_of(notification.pid, _descriptor(notification))
        try:
            tag = self._tags.peek(ctypes.c_int32(held))
        finally:
            os.close(held)
        if tag is None or not tag.flags & layout.TAG_BOUND:
            return False
        return (tag.family, bytes(tag.addr), tag.port) == (address.family, address.address, address.port)

    def _serve(self, notification: Notification) -> None:
        fd = _descriptor(notification)
        try:
            process, held = self._processes.copy_of(notification.pid, fd)
        except OSError:
            self._listener.resume(notification.id)  # EBADF and the like: the kernel says it better
            return
        try:
            error = self._serve_socket(notification, process, fd, held)
        finally:
            # Before the call goes on: while we have the old socket, the program's epoll instances still see it.
            os.close(held)
        if error is None:
            self._listener.resume(notification.id)
        elif not self._listener.answer(notification.id, error) and not error:
            self._unheard.add(_caller(notification))
        self._spares.refill()

    def _serve_socket(self, notification: Notification, process: Process, fd: int, held: int) -> int | None:
        """Give the errno that the call ends with here (0: it has succeeded), None where it has to run."""
        call = self._calls[notification.nr]
        address = None if call is Call.LISTEN else self._address(notification)
        answer = self._desk.ask(held, call, address, process.fdinfo, fd)
        if answer is None:
            return None
        return self._act(Swap(notification, call, process, fd, held, address, answer.facts, answer.descriptor))

    def _address(self, notification: Notification) -> Sockaddr | None:
        try:
            return parse_sockaddr(
                self._memory.read(notification.pid, notification.arg1, notification.arg2 & 0xFFFFFFFF)
            )
        except OSError:
            return None  # a bad pointer: the kernel's EFAULT

    def _act(self, swap: Swap) -> int | None:
        """Decide, and carry it out; give what `_serve_socket` does."""
        v6only = swap.facts.family == 6 and twin.is_v6only(swap.held, swap.facts.protocol)
        decision = decide(swap.call, swap.address, swap.facts, v6only)
        error: int | None = None
        if decision.action is Action.REFUSE:
            error = decision.error
        elif decision.action is not Action.RESUME:
            error = self._swap(swap, decision, v6only)
        if self._tell is not None:
            self._tell(Told(swap.call, swap.address, decision, error or 0))
        return error

    def _swap(self, swap: Swap, decision: Decision, v6only: bool) -> int | None:
        """Put a twin in the socket's place; give what `_serve_socket` does."""
        options = twin.options_set(self._desk.options)
        _, flags, probed = swap.descriptor
        if not probed & PROBED_FLAGS:
            flags = carry.descriptor_flags(swap.process.fdinfo, swap.fd)
            probed |= PROBED_OWNED
        error = None
        new = self._twin(decision, swap.facts)
        try:
            twin.liken(new, swap.held, flags, options, v6only, bool(probed & PROBED_OWNED))
            if swap.call is Call.BIND:
                assert swap.address is not None
                error = self._bind(new, swap.address)
            if not error:
                self._replace(swap, new.fileno(), flags)
        finally:
            new.close()
        return error

    def _twin(self, decision: Decision, facts: Facts) -> Socket:
        if decision.action is Action.TO_HOST and decision.netns == self._namespaces.home_cookie:
            return self._spares.take(facts.family, facts.protocol)
        to_host = decision.action is Action.TO_HOST
        with self._namespaces.inside(decision.netns if to_host else facts.container_netns):
            new = twin.make(facts.family, facts.protocol)
        try:
            self._tag(new, Home.HOST if to_host else Home.CONTAINER)
        except OSError:
            new.close()
            raise
        return new

    def _tag(self, sock: Socket, home: Home) -> None:
        self._tag_key.value = sock.fileno()
        self._tags.put(self._tag_key, self._home_tags[home])

    def _bind(self, sock: Socket, address: Sockaddr) -> int:
        """Bind the twin to what the program asked for; the hook makes it the endpoint. Gives an errno."""
        text = str(address.ip)
        if sock.family == twin.AF_INET6 and address.family == 4:
            text = f"::ffff:{text}"
        try:
            sock.bind((text, address.port))
        except OSError as error:
            return error.errno or errno.EIO
        if sock.proto == _IPPROTO_MPTCP:
            tag = self._tags.get(ctypes.c_int32(sock.fileno()))
            if tag is not None and tag.home == Home.HOST:
                tag.flags |= layout.TAG_BOUND
                self._tags.put(ctypes.c_int32(sock.fileno()), tag)
        return 0

    def _replace(self, swap: Swap, new: int, flags: int) -> None:
        """Put the twin at its descriptor, and wherever else the process has the old socket."""
        unique, fd = swap.notification.id, swap.fd
        attached = None
        if carry.must_look(swap.descriptor.probed, swap.descriptor.references, self._references):
            attached = carry.find(swap.notification.pid, os.fstat(swap.held).st_ino, fd)
        self._listener.replace(unique, new, fd, bool(flags & os.O_CLOEXEC))
        if attached is None:
            return
        for copy in attached.copies:
            with contextlib.suppress(OSError):
                cloexec = bool(carry.descriptor_flags(swap.process.fdinfo, copy) & os.O_CLOEXEC)
                self._listener.replace(unique, new, copy, cloexec)
        carry.watch_again(attached.watches, new, swap.process.get_fd)


def _caller(notification: Notification) -> tuple[int, int]:
    """Who asked, and about which descriptor."""
    return notification.pid, notification.arg0


def _descriptor(notification: Notification) -> int:
    """The first argument as the kernel reads it: an int."""
    fd = notification.arg0 & 0xFFFFFFFF
    return fd - (1 << 32) if fd & 0x80000000 else fd


def serve(supervisor: Supervisor, listener: Listener, journal: mmap.mmap, holder: int) -> None:
    """Serve until the last process of the container is gone, or the holder (a pidfd) is.

    ``journal`` is shared with the holder: the notification at work, zero where there is none.
    """
    listener.wake_on_this_core()
    page = (ctypes.c_char * Listener.SIZE).from_buffer(journal)
    blank = bytes(Listener.SIZE)
    left = page.raw
    if left != blank and listener.is_valid(Notification.unpack(left).id):
        supervisor.handle(left, again=True)
    page.raw = blank
    poll = select.poll()
    poll.register(listener.fd, select.POLLIN)
    poll.register(holder, select.POLLIN)
    while True:
        ready = poll.poll()
        for fd, what in ready:
            if fd == holder or what & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                return
        if listener.receive(page):
            supervisor.handle(page.raw)
            page.raw = blank
