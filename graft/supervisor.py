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
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graft import carry, layout, twin
from graft.decision import Action, Call, Decision, Facts, Rules, Sockaddr, decide, parse_sockaddr
from graft.kernel import netns
from graft.kernel.pidfd import MemoryReader
from graft.kernel.seccomp import Listener, Notification, architecture
from graft.layout import Home
from graft.maps import Maps
from graft.processes import Processes
from graft.rules import Lookup

_TCP_INFO = 11
_IPPROTO_MPTCP = 262
_SOCKADDR_SIZE = 28  # sizeof(struct sockaddr_in6)
_COOKIE = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Told:
    """One line for whoever watches: what was asked, and what became of it."""

    call: Call
    address: Sockaddr | None
    decision: Decision
    error: int = 0


class Namespaces:
    """Puts the calling thread where a twin is to be made. Its home is the host's namespace."""

    def __init__(self, home: Path, paths: Callable[[int], Path | None]) -> None:
        self._home = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
        netns.setns(self._home)
        self.home_cookie = netns.cookie()
        self._paths = paths

    @contextlib.contextmanager
    def inside(self, cookie: int):  # type: ignore[no-untyped-def]
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


class _MapLookups(Lookup):
    """The rules, and what a decision needs to know of an endpoint."""

    def __init__(self, maps: Maps) -> None:
        super().__init__(maps)
        self._endpoints = maps.endpoints

    def endpoint(self, number: int) -> tuple[int, int] | None:
        """(family, namespace) of an endpoint, None where it is gone."""
        found = self._endpoints.peek(ctypes.c_uint32(number))
        return None if found is None else (found.family, found.netns)


class Supervisor:
    """Serves one listener."""

    def __init__(
        self,
        maps: Maps,
        container: int,
        listener: Listener,
        namespaces: Namespaces,
        tell: Callable[[Told], None] | None = None,
    ) -> None:
        self._tags, self._options, self._containers = maps.tags, maps.options, maps.containers
        self._container = container
        self._key = ctypes.c_uint32(container)
        self._listener = listener
        self._namespaces = namespaces
        self._lookups = _MapLookups(maps)
        self._memory = MemoryReader(_SOCKADDR_SIZE)
        self._processes = Processes()
        self._tell = tell
        self._calls = {number: Call(name) for name, number in architecture()[1].items()}
        self._references = self._expected_references()

    def _expected_references(self) -> int:
        """What the probe counts for a socket that one process has once and we have a copy of."""
        with socket.socket() as sock, socket.socket(fileno=os.dup(sock.fileno())) as copy:
            copy.getsockname()
            found = self._options.get(ctypes.c_int32(copy.fileno()))
        return found.references if found is not None and found.probed & layout.PROBED else 0

    def handle(self, raw: bytes | bytearray, again: bool = False) -> None:
        """Serve one notification. An error of ours ends the program's call with an errno, never Graft.

        ``again``: an earlier supervisor may have got anywhere with it.
        """
        notification = Notification.unpack(raw)
        try:
            if again and self._bound_already(notification):
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

    def _bound_already(self, notification: Notification) -> bool:
        """Whether the descriptor of this bind is the bound twin of just this address already."""
        address = self._address(notification)
        if self._calls[notification.nr] is not Call.BIND or address is None:
            return False
        fd = self._processes.get_fd(notification.pid, notification.args[0] & 0xFFFFFFFF)
        try:
            tag = self._tags.peek(ctypes.c_int32(fd))
        finally:
            os.close(fd)
        if tag is None or not tag.flags & layout.TAG_BOUND:
            return False
        return (tag.family, bytes(tag.addr), tag.port) == (address.family, address.address, address.port)

    def _serve(self, notification: Notification) -> None:
        call = self._calls[notification.nr]
        fd = ctypes.c_int32(notification.args[0] & 0xFFFFFFFF).value
        try:
            held = self._processes.get_fd(notification.pid, fd)
        except OSError:
            self._listener.resume(notification.id)  # EBADF and the like: the kernel says it better
            return
        old = self._tcp_socket(held)
        if old is None:
            os.close(held)
            self._listener.resume(notification.id)
            return
        with old:
            self._serve_socket(notification, call, fd, old)

    @staticmethod
    def _tcp_socket(fd: int) -> socket.socket | None:
        """``fd`` as a TCP (or MPTCP) socket; None for anything else."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            return None
        if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.proto in (socket.IPPROTO_TCP, _IPPROTO_MPTCP):
            return sock
        sock.detach()
        return None

    def _serve_socket(self, notification: Notification, call: Call, fd: int, old: socket.socket) -> None:
        rules = self._rules()
        tag = self._tags.peek(ctypes.c_int32(old.fileno()))
        cookie = _COOKIE.unpack(old.getsockopt(socket.SOL_SOCKET, netns.SO_NETNS_COOKIE, 8))[0]
        if rules is None or (tag is not None and tag.container != self._container):
            self._listener.resume(notification.id)
            return
        if tag is None and cookie != rules.netns:
            self._listener.resume(notification.id)  # of a namespace that the program made or was handed
            return
        facts = self._facts(old, tag, cookie)
        address = self._address(notification) if call is not Call.LISTEN else None
        decision = decide(call, address, facts, rules, self._lookups)
        error = self._act(notification, call, fd, old, address, facts, rules, decision)
        if self._tell is not None:
            self._tell(Told(call, address, decision, error))

    def _rules(self) -> Rules | None:
        found = self._containers.peek(self._key)
        if found is None:
            return None
        return Rules(found.ruleset, found.netns, found.bind_default, found.connect_default)

    def _address(self, notification: Notification) -> Sockaddr | None:
        size = notification.args[2] & 0xFFFFFFFF
        try:
            return parse_sockaddr(self._memory.read(notification.pid, notification.args[1], size))
        except OSError:
            return None  # a bad pointer: the kernel's EFAULT

    @staticmethod
    def _facts(old: socket.socket, tag: layout.Tag | None, cookie: int) -> Facts:
        six = old.family == socket.AF_INET6
        return Facts(
            home=Home.CONTAINER if tag is None else Home(tag.home),
            family=6 if six else 4,
            netns=cookie,
            state=old.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 1)[0],
            # This getsockname() also sets off the hook's probe of the socket's file.
            local_port=old.getsockname()[1],
            bound=tag is not None and bool(tag.flags & layout.TAG_BOUND),
            v6only=six and bool(old.getsockopt(twin.SOL_IPV6, twin.IPV6_V6ONLY)),
        )

    def _act(
        self,
        notification: Notification,
        call: Call,
        fd: int,
        old: socket.socket,
        address: Sockaddr | None,
        facts: Facts,
        rules: Rules,
        decision: Decision,
    ) -> int:
        """Carry a decision out; give the errno that the call ended with here, 0 if it runs or has succeeded."""
        if decision.action is Action.RESUME:
            self._listener.resume(notification.id)
            return 0
        if decision.action is Action.REFUSE:
            self._listener.answer(notification.id, decision.error)
            return decision.error
        assert address is not None
        to_host = decision.action is Action.TO_HOST
        flags = carry.descriptor_flags(notification.pid, fd)
        recorded = self._options.peek(ctypes.c_int32(old.fileno()))
        with self._namespaces.inside(decision.netns if to_host else rules.netns):
            new = twin.make(old, flags, twin.options_set(recorded), facts.v6only if facts.family == 6 else None)
        with new:
            self._tag(new, decision.endpoint, Home.HOST if to_host else Home.CONTAINER)
            status = os.fstat(old.fileno())
            if status.st_uid or status.st_gid:
                os.fchown(new.fileno(), status.st_uid, status.st_gid)
            if call is Call.BIND:
                error = self._bind(new, address, facts)
                if error:
                    self._listener.answer(notification.id, error)
                    return error
            self._replace(notification, fd, status.st_ino, new, flags, recorded)
            if call is Call.BIND:
                self._listener.answer(notification.id)
            else:
                self._listener.resume(notification.id)
        return 0

    def _tag(self, sock: socket.socket, endpoint: int, home: Home, flags: int = 0) -> None:
        tag = layout.Tag(container=self._container, endpoint=endpoint, home=home, flags=flags)
        self._tags.put(ctypes.c_int32(sock.fileno()), tag)

    def _bind(self, sock: socket.socket, address: Sockaddr, facts: Facts) -> int:
        """Bind the twin to what the program asked for; the hook makes it the endpoint. Gives an errno."""
        raw = address.address
        text = socket.inet_ntop(socket.AF_INET, raw[:4]) if address.family == 4 else None
        if facts.family == 6:
            text = f"::ffff:{text}" if text else socket.inet_ntop(socket.AF_INET6, raw)
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

    def _replace(
        self,
        notification: Notification,
        fd: int,
        inode: int,
        new: socket.socket,
        flags: int,
        recorded: layout.Options | None,
    ) -> None:
        """Put the twin at ``fd`` and wherever else the process has the old socket."""
        attached = None
        if carry.must_look(recorded, self._references):
            attached = carry.find(notification.pid, inode, fd)
        self._listener.replace(notification.id, new.fileno(), fd, bool(flags & os.O_CLOEXEC))
        if attached is None:
            return
        for copy in attached.copies:
            with contextlib.suppress(OSError):
                cloexec = bool(carry.descriptor_flags(notification.pid, copy) & os.O_CLOEXEC)
                self._listener.replace(notification.id, new.fileno(), copy, cloexec)
        carry.watch_again(
            attached.watches, new.fileno(), lambda number: self._processes.get_fd(notification.pid, number)
        )


def serve(supervisor: Supervisor, listener: Listener, journal: mmap.mmap, holder: int) -> None:
    """Serve until the last process of the container is gone, or the holder (a pidfd) is.

    ``journal`` is shared with the holder: the notification at work, zero where there is none.
    """
    listener.wake_on_this_core()
    blank = bytes(Listener.SIZE)
    left = journal[: Listener.SIZE]
    if left != blank and listener.is_valid(Notification.unpack(left).id):
        supervisor.handle(left, again=True)
    journal[: Listener.SIZE] = blank
    poll = select.poll()
    poll.register(listener.fd, select.POLLIN)
    poll.register(holder, select.POLLIN)
    while True:
        ready = poll.poll()
        for fd, what in ready:
            if fd == holder or what & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                return
        raw = listener.receive()
        if raw is None:
            continue
        journal[: Listener.SIZE] = bytes(raw)
        supervisor.handle(raw)
        journal[: Listener.SIZE] = blank
