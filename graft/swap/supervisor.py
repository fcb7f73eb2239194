"""The supervisor of one container: serves its trapped calls, and replaces its sockets where a rule says so.

Theory of operation

    RECV ── ask about the socket ── decide ──┬── RESUME: the call runs on the socket as it is
                                             ├── REFUSE: the call fails with an errno
                                             └── replacement ── tag ── (bind) ── ADDFD ── the call runs, or succeeds

A bind to an endpoint is made here, on the replacement socket, before the program has it: if it fails, the program gets
the kernel's errno and keeps its socket. A bind in the container runs with the program's own rights. A connect runs in
the program's own thread, where it may block, be interrupted, or finish in the background. The hooks see both, and
decide on the kernel's copy of the address; nothing here can extend what a container may do.

It serves one call at a time, and makes no call that blocks; a second thread only waits for the end
(graft/swap/end_watcher.py). The program's thread sleeps meanwhile, and the kernel gives its core to this process and
back: what costs time is the work between RECV and the answer, and its system calls. So one question to the hooks gets
all that they know (graft/swap/desk.py), and what can wait is done after the answer, for several calls at once.

The notification being served is in memory that is shared with the keeper's process (graft/swap/keeper.py): when a
supervisor dies, the next one serves that call, and the container's calls wait instead of failing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import time
from _socket import socket as Socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from graft.datapath import layout
from graft.datapath.layout import PROBED_FLAGS
from graft.kernel.bpf import Map
from graft.kernel.pidfd import MemoryReader
from graft.kernel.seccomp import Listener, Notification
from graft.kernel.seccomp_filter import TRAPPED, architecture
from graft.kernel.socket_calls import SOCKADDR_SIZE
from graft.model.address import mapped_text
from graft.model.sockaddr import Sockaddr, parse_sockaddr
from graft.model.transport import Home
from graft.state.call_times import CallTimer
from graft.swap import descriptors, socket_copy
from graft.swap.birth import SocketBirth
from graft.swap.decision import RESUME, Action, Call, Decision, SocketFacts, decide
from graft.swap.desk import Desk, DeskAnswer
from graft.swap.end_watcher import EndWatcher
from graft.swap.fast_calls import is_plain_connect
from graft.swap.ferry_client import FerryClient
from graft.swap.processes import Process, Processes
from graft.swap.socket_pool import Owner, SocketKind, SocketPool
from graft.swap.unix_bind import UnixBinder
from graft.swap.unreported import UnreportedBinds

if TYPE_CHECKING:
    from graft.swap._fast_calls import FastCalls

_IPPROTO_MPTCP, _IPPROTO_UDP = 262, 17
_CLOSE_TOGETHER = 8  # replaced sockets, of which this process has the last descriptor
_BIND, _LISTEN = Call.BIND, Call.LISTEN  # constants, because an enum's attributes are slow to look up
_REFUSE, _RESUME, _TO_HOST, _TO_BOTH = Action.REFUSE, Action.RESUME, Action.TO_HOST, Action.TO_BOTH
_IPV6_ONLY = Action.IPV6_ONLY


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A trapped call, and the decision about it, for `graft run -v`. ``error``: the errno that it failed with here;
    ``port``: the one that a replacement socket was bound to. ``text`` is the whole line for a bind of a unix socket.
    """

    call: Call
    address: Sockaddr | None
    decision: Decision
    error: int = 0
    port: int = 0
    text: str = ""


class TrappedCall(NamedTuple):
    """A trapped call and all that is known about it. ``duplicate`` is this process's descriptor of its socket."""

    notification: Notification
    call: Call
    process: Process
    duplicate: int
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
        processes: Processes,
        birth: SocketBirth,
        ferry: FerryClient,
        log: Callable[[LogEntry], None] | None = None,
        unix: UnixBinder | None = None,
        fast: FastCalls | None = None,
    ) -> None:
        self._tags, self._desk, self._pool, self._birth, self._ferry = tags, desk, pool, birth, ferry
        self._listener = listener
        self._memory = MemoryReader(SOCKADDR_SIZE)
        self._processes = processes
        self._log, self._unix, self._fast = log, unix, fast
        self._architecture, numbers = architecture()
        self._calls = {numbers[name]: Call[name.upper()] for name in TRAPPED}
        self._socket_number = numbers["socket"]
        self._expected_references = 0
        self._unreported = UnreportedBinds()
        self._replaced: list[int] = []
        self._bound_port = 0  # of the last replacement socket, for the log

    def calibrate(self) -> None:
        """Count the references to a socket with one descriptor in its program and a duplicate here.

        There is one more where this process has a second thread: system calls take references to descriptors then.
        """
        sock = Socket()
        duplicate = os.dup(sock.fileno())
        try:
            self._expected_references = self._desk.count_references(duplicate)
        finally:
            os.close(duplicate)
            sock.close()

    def handle(self, raw: bytes | bytearray, taken_over: bool = False) -> None:
        """Serve one notification. Where that fails, the program's call fails with an errno.

        ``taken_over``: a previous supervisor died while it served the notification.
        """
        notification = Notification.unpack(raw)
        try:
            self._dispatch(notification, taken_over)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                # The caller or its descriptor is gone: the kernel then has the right errno.
                self._listener.resume(notification.id)
            else:
                self._listener.answer(notification.id, error.errno or errno.EIO)
        except Exception:
            self._listener.answer(notification.id, errno.EIO)
            raise

    def _dispatch(self, notification: Notification, taken_over: bool) -> None:
        call = self._calls.get(notification.nr)
        if notification.arch != self._architecture:
            # A container's own profile (graft/oci/seccomp_profile.py) notifies 32-bit calls too: they run unchanged.
            self._listener.resume(notification.id)
        elif notification.nr == self._socket_number:
            self._birth.serve(notification)
            self._pool.refill()
        elif call is None:
            self._listener.resume(notification.id)
        elif (taken_over or (self._unreported and self._was_unreported(notification))) and self._is_bound_already(
            notification, call
        ):
            self._listener.answer(notification.id)
        else:
            self._serve(notification, call)

    def _was_unreported(self, notification: Notification) -> bool:
        """Whether this may be the restart of a bind that succeeded, but was interrupted by a signal."""
        return self._unreported.remove(notification.pid, notification.fd)

    def _is_bound_already(self, notification: Notification, call: Call) -> bool:
        """Whether the descriptor of this bind is a replacement socket that is bound for this address already."""
        address = self._address(notification)
        if call is not Call.BIND:
            return False
        _, duplicate = self._processes.duplicate_fd(notification.pid, notification.fd)
        try:
            if address is None:
                return self._unix is not None and self._unix.is_bound_already(notification, duplicate)
            tag = self._tags.peek(ctypes.c_int32(duplicate))
        finally:
            os.close(duplicate)
        if tag is None or not tag.bound_port:
            return False
        return (tag.family, bytes(tag.addr), tag.port) == (address.family, address.address, address.port)

    def _serve(self, notification: Notification, call: Call) -> None:
        unique, fd = notification.id, notification.fd
        try:
            process, duplicate = self._processes.duplicate_fd(notification.pid, fd)
        except OSError:
            self._listener.resume(unique)  # EBADF, for example: the kernel reports it
            return
        error = None
        try:
            address = None if call is _LISTEN else self._address(notification)
            answer = self._desk.ask(duplicate, call, address, process.fdinfo, fd, notification.pid)
            if not self._listener.is_valid(unique):
                return  # whose descriptor and address these are is not known (`_duplicate_of_caller`)
            if answer is None and address is None and call is _BIND and self._unix is not None:
                error = self._bind_unix(self._unix, notification, process, duplicate)
            elif answer is not None:
                error = self._decide_and_apply(TrappedCall(notification, call, process, duplicate, address, answer))
        finally:
            # Before the call runs: the program's epoll instances report the old socket as long as it is open here.
            if duplicate not in self._replaced:
                os.close(duplicate)
        if error is None:
            self._listener.resume(unique)
        elif not self._listener.answer(unique, error) and not error:
            self._unreported.add(notification.pid, fd)
        self._do_deferred_work()

    def _bind_unix(self, unix: UnixBinder, notification: Notification, process: Process, duplicate: int) -> int | None:
        """Bind a unix socket where a rule names its path. Gives what `_decide_and_apply` gives."""
        done = unix.bind(notification, process, duplicate, partial(self._listener.is_valid, notification.id))
        if done is None:
            return None
        if self._log is not None:
            self._log(LogEntry(_BIND, None, RESUME, done.error, text=done.text))
        return done.error

    def _do_deferred_work(self) -> None:
        """What can be done after the answer, and is cheaper for several sockets at once."""
        self._pool.refill()
        if len(self._replaced) >= _CLOSE_TOGETHER:
            for fd in self._replaced:
                os.close(fd)
            self._replaced.clear()

    def _address(self, notification: Notification) -> Sockaddr | None:
        try:
            return parse_sockaddr(self._memory.read(notification.pid, notification.address, notification.size))
        except OSError:
            return None  # a bad pointer: the kernel's EFAULT

    def _decide_and_apply(self, trapped: TrappedCall) -> int | None:
        """Decide, and apply the decision. Gives the errno to answer with (0: success), None where the call must run."""
        facts = trapped.answer.facts
        v6only = facts.family == 6 and socket_copy.is_v6only(trapped.duplicate, facts.protocol)
        decision = decide(trapped.call, trapped.address, facts, v6only)
        error: int | None = None
        self._bound_port = 0
        if decision.action is _REFUSE:
            error = decision.error
            self._desk.tell_refused(trapped.duplicate)
        elif decision.action is _IPV6_ONLY:
            socket_copy.make_v6only(trapped.duplicate, facts.protocol)
        elif decision.action is _TO_BOTH:
            error = self._bind_for_both(trapped, v6only)
        elif decision.action is not _RESUME:
            error = self._replace(trapped, decision, v6only)
        if self._log is not None:
            self._log(LogEntry(trapped.call, trapped.address, decision, error or 0, self._bound_port))
        return error

    def _replace(self, trapped: TrappedCall, decision: Decision, v6only: bool) -> int | None:
        """Replace the socket. Gives what `_decide_and_apply` gives."""
        facts, (references, flags, probed, options, overflow, owner), _ = trapped.answer
        notification, duplicate = trapped.notification, trapped.duplicate
        if not probed & PROBED_FLAGS:
            flags = descriptors.descriptor_flags(trapped.process.fdinfo, notification.fd)
        names = socket_copy.recorded_options(self._desk.options) if options or overflow else ()
        error = None
        if owner is None:  # who opened it is not known: it gets what its thread could open now, and no more
            owner = trapped.process.file_owner()
            if not self._listener.is_valid(notification.id):
                return errno.EINTR  # as in `_duplicate_of_caller`
        replacement = self._get_replacement(decision, facts, owner)
        try:
            socket_copy.copy_socket_state(replacement, duplicate, flags, names, v6only or decision.v6only)
            if trapped.call is _BIND and decision.action is _TO_HOST:
                assert trapped.address is not None
                error = self._bind(replacement, trapped.address)
            if not error:
                fd, others = replacement.fileno(), None
                if descriptors.needs_search(probed, references, self._expected_references):
                    others = descriptors.find_references(notification.pid, os.fstat(duplicate).st_ino, notification.fd)
                self._listener.replace(notification.id, fd, notification.fd, bool(flags & os.O_CLOEXEC))
                if others is not None:
                    self._replace_references(trapped, others, fd)
                elif not facts.local_port and facts.home == Home.CONTAINER:
                    # The old socket is open here only, is registered nowhere, and has no port: it can be closed later.
                    # (On the host's stack another thread's datagram may have given it one since.)
                    self._replaced.append(duplicate)
                    self._show_plain(trapped, decision)
        finally:
            replacement.close()
        return error

    def _show_plain(self, trapped: TrappedCall, decision: Decision) -> None:
        """Have the compiled part do the same where the hooks give the same answer, for this thread and those it knows.

        A spare socket is of the host's namespace. An answer about a socket with fewer references than expected is as
        good as another one.
        """
        if self._fast is None or decision.netns != self._pool.host_cookie:
            return
        if is_plain_connect(trapped.call, trapped.address, decision, trapped.answer):
            facts = trapped.answer.facts
            family = socket_copy.AF_INET if facts.family == 4 else socket_copy.AF_INET6
            self._fast.remember(trapped.answer.raw, family, socket_copy.SOCK_STREAM, facts.protocol)
            with contextlib.suppress(OSError):  # it has ended, or there is no descriptor left: Python goes on
                self._processes.show(trapped.notification.pid, self._fast.know)

    def _bind_for_both(self, trapped: TrappedCall, v6only: bool) -> int:
        """Bind a datagram socket on the host's stack to a port of the kernel's choice there, and inside to the same.

        Gives an errno.
        """
        family, protocol = trapped.answer.facts.family, trapped.answer.facts.protocol
        with socket_copy.as_socket(trapped.duplicate, family, protocol) as sock:
            try:
                sock.bind(("0.0.0.0" if family == 4 else "::", 0))
            except OSError as error:
                return error.errno or errno.EIO
            self._bound_port = sock.getsockname()[1]
        self._ferry.stand_in(self._bound_port, ipv4=not v6only, ipv6=family == 6)
        return 0

    def _get_replacement(self, decision: Decision, facts: SocketFacts, owner: Owner) -> Socket:
        family = socket_copy.AF_INET if facts.family == 4 else socket_copy.AF_INET6
        kind = SocketKind(family, socket_copy.type_of(facts.protocol), facts.protocol, owner)
        if decision.action is _TO_HOST:
            if facts.protocol == _IPPROTO_UDP:  # not born, by a call that is not trapped
                self._ferry.is_there_for(owner)
            return self._pool.get(Home.HOST, decision.netns, kind)
        return self._pool.get(Home.CONTAINER, facts.container_netns, kind)

    def _bind(self, sock: Socket, address: Sockaddr) -> int:
        """Bind a replacement to the program's address, which the hook rewrites to the endpoint. Gives an errno."""
        text = str(address.ip)
        if sock.family == socket_copy.AF_INET6 and address.family == 4:
            text = mapped_text(text)
        try:
            sock.bind((text, address.port))
        except OSError as error:
            return error.errno or errno.EIO
        if self._log is not None:
            self._bound_port = sock.getsockname()[1]
        if sock.proto == _IPPROTO_MPTCP:
            self._complete_tag(sock)
        return 0

    def _complete_tag(self, sock: Socket) -> None:
        """Write the port to the tag, as the hook after a bind does, which sees only an MPTCP socket's first subflow."""
        tag = self._tags.get(ctypes.c_int32(sock.fileno()))
        if tag is not None and tag.home == Home.HOST:
            tag.bound_port = sock.getsockname()[1]  # the real port: the hook shows a supervisor no other
            self._tags.put(ctypes.c_int32(sock.fileno()), tag)

    def _replace_references(self, trapped: TrappedCall, others: descriptors.SocketReferences, replacement: int) -> None:
        """Replace the socket's duplicates in the process, and register the replacement where the socket is."""
        for fd in others.duplicates:
            with contextlib.suppress(OSError):
                cloexec = bool(descriptors.descriptor_flags(trapped.process.fdinfo, fd) & os.O_CLOEXEC)
                self._listener.replace(trapped.notification.id, replacement, fd, cloexec)
        descriptors.copy_registrations(others.registrations, replacement, partial(self._duplicate_of_caller, trapped))

    def _duplicate_of_caller(self, trapped: TrappedCall, fd: int) -> int:
        """A duplicate of a descriptor of the caller's. Raises OSError, also where it does not wait any more: its id
        and its pidfd may be another program's by now, with that one's rights. A second thread has executed it.
        """
        duplicate = trapped.process.duplicate_fd(fd)
        if not self._listener.is_valid(trapped.notification.id):
            os.close(duplicate)
            raise ProcessLookupError(errno.ESRCH, "the caller does not wait any more")
        return duplicate

    def receive(self, page: ctypes.Array[ctypes.c_char]) -> bool:
        """Whether ``page`` has a notification for `handle` now; if not, it is still zero. Blocks where none is waiting.

        Plain calls may be answered meanwhile (graft/swap/fast_calls.py).
        """
        return self._listener.receive(page) if self._fast is None else self._fast.serve(page)


def serve(
    supervisor: Supervisor, listener: Listener, journal: mmap.mmap, keeper: int, timer: CallTimer | None = None
) -> None:
    """Serve until the container's last process has ended, or the keeper's process (``keeper`` is its pidfd).

    ``journal``, shared with the keeper's process, has the notification being served, or zeros. ``timer`` counts what
    is not served by the compiled part.
    """
    listener.wake_on_this_core()
    page = (ctypes.c_char * Listener.SIZE).from_buffer(journal)
    blank = bytes(Listener.SIZE)
    unfinished = page.raw
    watcher = EndWatcher(listener.fd, keeper)
    with watcher.running():
        supervisor.calibrate()
        if unfinished != blank and listener.is_valid(Notification.unpack(unfinished).id):
            supervisor.handle(unfinished, taken_over=True)
        page.raw = blank
        while not watcher.should_stop:
            if supervisor.receive(page):
                started = time.monotonic_ns()
                supervisor.handle(page.raw)
                page.raw = blank
                if timer is not None:
                    timer.add(time.monotonic_ns() - started)
