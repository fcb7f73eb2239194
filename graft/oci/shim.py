"""The shim: a process that serves one container of an OCI runtime, from before its start until its end.

    wrapper ── shim (listens) ── runc or crun ── createRuntime hook ──▶ attach ── the container's program starts
                                             └── seccomp listeners ──▶ a supervisor for each

The runtime sends a listener for each process that it starts in the container: the first one, and one for each `exec`.
The shim is the keeper of each (graft/swap/keeper.py), so that a supervisor that dies is started again. When the
container's cgroup is empty, the shim removes the container's rules and record, its sockets and its files.

If the shim itself is killed, the supervisors continue, and the last of them removes these. No further process can be
started in the container then, because the runtime cannot connect to the listener's socket.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

from graft.datapath.dataplane import keepers_cgroup
from graft.errors import GraftError, RefusedError
from graft.kernel import cgroup, process
from graft.kernel.pidfd import has_ended
from graft.model.transport import Transport
from graft.oci.children import in_child
from graft.oci.message_loop import MessageLoop
from graft.oci.plan import Plan, cgroup_of, find_container
from graft.oci.saved_choice import saved_for
from graft.oci.state import Message, State
from graft.policy.validator import refuse_without_supervisor
from graft.splice import client as splice
from graft.state import leftovers, members
from graft.state.changed_policy import refuse_changed
from graft.state.installation import Installation
from graft.state.records import RUNTIME, Container
from graft.swap.keeper import Keeper, stop_all

HOOK_SOCKET, LISTENER_SOCKET = "hook", "seccomp"
_EMPTY_TIMEOUT_MS = 2000
_MAX_SUPERVISORS = 64
"""Of one container. Each is a process of the host's, for as long as what an engine's `exec` started, or left behind, is
there: an image may have a health check do so every second.
"""
Closing = Callable[[Installation, Container], AbstractContextManager[None]]
_SHARE = 16  # a container has at most one in so many of the descriptors that a process may have, for its listeners


class Attachment:
    """One container: attached once, with a supervisor for each listener."""

    def __init__(self, plan: Plan, graft: Installation, closing: Closing | None = None) -> None:
        """``closing`` is a substitute for `leftovers.closed_after`, which may wait for sockets of the container."""
        self._plan = plan
        self._graft = graft
        self._closing = closing
        self.keepers: list[Keeper] = []
        self._events: int | None = None
        self.container: Container | None = None

    def attach(self, state: State, first: int | None = None) -> None:
        """Attach the container in ``state``, if it is not attached yet. Raises GraftError.

        ``first`` is a pidfd of its first process, where that process does not wait for the answer.
        """
        plan = self._plan
        if state.id != plan.id:
            raise RefusedError(f"the container is {state.id!r}, and this supervisor is for {plan.id!r}")
        if self.container is not None:
            return
        path, cookie = find_container(state.pid, plan)
        if first is not None and has_ended(first):
            # Its id may be another process's by now, and what was found by it not the container's.
            raise RefusedError("the container's first process has ended")
        shim = 0 if plan.transport is Transport.DIRECT else os.getpid()
        events = members.open_events(path)  # from now on, to look the cgroup up waits for nobody
        try:
            self.container = self._attached_or_created(path, cookie, shim, state.pid)
        except BaseException:
            os.close(events)
            raise
        self._events = events

    def _attached_or_created(self, path: Path, cookie: int, shim: int, pid: int) -> Container:
        if self._plan.folder is None:
            return self._attached_before(path, cookie) or self._create(path, cookie, shim, pid)
        # A shim stays for as long as its container: what it does once takes no memory of its own.
        return in_child(lambda: self._create(path, cookie, shim, pid))

    def _attached_before(self, path: Path, cookie: int) -> Container | None:
        """This container, where a `graft listen` before this one has attached it. Raises RefusedError where another is
        attached at its cgroup.
        """
        known = self._graft.containers.at(path)
        if known is not None and (known.engine, known.name, known.netns) != (RUNTIME, self._plan.id[:12], cookie):
            raise RefusedError(f"at its cgroup {path} another container is attached: {known.name}", "graft ps")
        return known

    def _create(self, path: Path, cookie: int, shim: int, pid: int) -> Container:
        plan = self._plan
        refuse_without_supervisor(plan.policy, plan.transport)
        compiled = self._graft.compile(plan.policy)
        self._graft.reap()
        name, engine = plan.id[:12], RUNTIME
        with saved_for(plan, path) as saved:
            if saved is not None:
                compiled, name, engine = self._graft.compile(saved.policy), saved.target.name, saved.target.engine
            with self._graft.transaction() as change:
                created = change.containers.create(
                    compiled, path, cookie, plan.transport, shim, name=name, engine=engine
                )
        refuse_changed(self._graft, created, compiled.policy)
        splice.serve(self._graft, created, pid)
        return created

    def start_supervisor(self, state: State, listener: int, first: int | None = None) -> None:
        """Start a supervisor for ``listener``, which this object closes, also where that fails.

        ``first``: as for `attach`. Raises GraftError where the listener is not of this container, or one too many.
        """
        try:
            self.attach(state, first)
            self._check_cgroup(state.pid)
            self._check_count()
        except BaseException:
            os.close(listener)
            raise
        plan, container = self._plan, self.container
        assert container is not None
        keeper = Keeper(
            plan.settings,
            container,
            listener,
            False,
            lambda graft: _clean_up(plan, graft, container),
            plan.killable,
            plan.datagrams,
        )
        self._start(keeper)
        self.keepers.append(keeper)

    @staticmethod
    def _start(keeper: Keeper) -> None:
        """Start a supervisor. Where that fails the listener is closed, because trapped calls would wait for ever."""
        try:
            keeper.start()
        except BaseException:
            keeper.stop()
            raise

    def _check_cgroup(self, pid: int) -> None:
        """Raises RefusedError where process ``pid`` (0: not known) is not in the container's cgroup."""
        assert self.container is not None
        path = cgroup_of(pid, self._plan) if pid else self.container.cgroup_path
        if not path.is_relative_to(self.container.cgroup_path):
            raise RefusedError(f"process {pid} is in the cgroup {path}, not in the container's")

    def _check_count(self) -> None:
        """Raises RefusedError where the container has as many supervisors as one may have."""
        most = min(_MAX_SUPERVISORS, process.descriptor_limit() // _SHARE)
        if len(self.keepers) >= most:
            self.check_supervisors()
        if len(self.keepers) >= most:
            raise RefusedError(f"the container has {most} supervisors already", "end what `exec` has started in it")

    def watch(self, loop: MessageLoop) -> None:
        """Have ``loop`` wake up when the cgroup becomes empty or populated."""
        if self._events is not None:
            loop.watch(self._events, select.POLLPRI, lambda: None)

    def unwatch(self, loop: MessageLoop) -> None:
        """Undo `watch`."""
        if self._events is not None:
            loop.unwatch(self._events)

    def check_supervisors(self) -> None:
        """Restart supervisors that have died, and close the listeners whose processes have all ended."""
        for keeper in list(self.keepers):
            if not keeper.reap():
                continue
            self.keepers.remove(keeper)
            if keeper.hung_up():
                keeper.stop()
                continue
            with contextlib.suppress(GraftError, OSError):
                self._start(keeper)
                self.keepers.append(keeper)

    @property
    def has_ended(self) -> bool:
        """Whether the last process of the container has ended."""
        return self._events is not None and _is_empty(self._events)

    def close(self) -> None:
        """Stop the supervisors, and remove the container's rules, record and files."""
        stop_supervisors([self])
        if self.container is not None:
            _remove_container(self._graft, self.container, self._closing)
        if self._events is not None:  # until here: it kept the cgroup's name in the kernel's cache
            os.close(self._events)
            self._events = None
        _remove_folder(self._plan.folder)


def stop_supervisors(attachments: Sequence[Attachment], patience: float | None = None) -> None:
    """Stop the supervisors of containers that have ended. ``patience``: as for `stop_all`."""
    keepers = [keeper for one in attachments for keeper in one.keepers]
    for one in attachments:
        one.keepers.clear()
    stop_all(keepers, patience)


def _remove_container(graft: Installation, container: Container, closing: Closing | None = None) -> None:
    with (
        contextlib.suppress(GraftError, OSError),
        (closing or leftovers.closed_after)(graft, container),
        graft.transaction(ended=container) as change,
    ):
        change.containers.remove(container)  # graftd sees that by itself, if it serves the container


def _clean_up(plan: Plan, graft: Installation, container: Container) -> None:
    """What a supervisor does at its end when the shim has died: the container's last one removes rules and files."""
    if not _becomes_empty(container.cgroup_path):
        return
    _remove_container(graft, container)
    _remove_folder(plan.folder)


def _remove_folder(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _becomes_empty(path: Path) -> bool:
    """Whether a cgroup is empty or removed, or soon will be: a process leaves its filter before its cgroup."""
    try:
        events = os.open(path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    poll = select.poll()
    poll.register(events, select.POLLPRI)
    while not _is_empty(events):
        if not poll.poll(_EMPTY_TIMEOUT_MS):
            return False
    return True


def _is_empty(events: int) -> bool:
    """Whether the cgroup of that cgroup.events has no process any more, or is removed."""
    try:
        return b"populated 0" in os.pread(events, 4096, 0)
    except OSError:
        return True


class Shim:
    """Serves one container: attaches it and starts its supervisors when its runtime sends a message."""

    def __init__(self, plan: Plan, hook: socket.socket, listeners: socket.socket, runtime: int) -> None:
        self._plan = plan
        self._attachment = Attachment(plan, Installation(plan.settings))
        self._failed = False
        self._loop = MessageLoop()
        self._loop.receive(hook, self._attach)
        self._loop.receive(listeners, self._start_supervisor)
        self._loop.watch(runtime, select.POLLIN, lambda: self._runtime_ended(runtime))

    def serve(self) -> None:
        """Serve until the container has ended, or its runtime has without creating one."""
        try:
            self._loop.serve(self._check)
        except BaseException:
            # As if this process were killed: what runs in the container keeps its supervisors.
            if self._attachment.container is None:
                self._attachment.close()
            raise
        self._loop.close()
        if self._stays_attached:
            _remove_folder(self._plan.folder)
        else:
            self._attachment.close()

    def _check(self) -> bool:
        self._attachment.check_supervisors()
        return self._failed or self._stays_attached or self._attachment.has_ended

    @property
    def _stays_attached(self) -> bool:
        """Whether the container needs no process of Graft's: the poststop hook removes its rules."""
        return self._plan.transport is Transport.DIRECT and self._attachment.container is not None

    def _runtime_ended(self, runtime: int) -> None:
        self._loop.unwatch(runtime)
        self._failed = self._attachment.container is None

    def _attach(self, message: Message, state: State) -> None:
        try:
            self._attachment.attach(state)
        except (GraftError, OSError) as error:
            message.reply(describe(error).encode())
            return
        self._attachment.watch(self._loop)
        message.reply(b"ok")

    def _start_supervisor(self, message: Message, state: State) -> None:
        listener = message.take_listener(state)
        if listener is None:
            return
        # Where that fails the listener is closed: the process's trapped calls fail, and it does not reach the host.
        with contextlib.suppress(GraftError, OSError):
            self._attachment.start_supervisor(state, listener)


def describe(error: GraftError | OSError) -> str:
    """An error in one line, for the operator."""
    if isinstance(error, GraftError):
        return error.message + (f" ({error.hint})" if error.hint else "")
    return f"cannot attach the container: {error}"


def listen(path: Path) -> socket.socket:
    """A socket at ``path`` for root only. Raises GraftError where the path is too long."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise GraftError(
            f"cannot listen at {path}: {error}", "a shorter GRAFT_RUN_DIR: a socket's path has at most 107 bytes"
        ) from error
    os.chmod(path, 0o600)
    sock.listen(128)
    sock.setblocking(False)
    return sock


def start(plan: Plan, hook: socket.socket, listeners: socket.socket, lock: int, runtime: int) -> None:
    """Start the shim as a daemon. It ends when the process of the pidfd ``runtime`` ends without a container.

    ``lock`` is a locked descriptor of its folder, which the shim keeps open while it runs.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            serve(plan, hook, listeners, lock, runtime)
    finally:
        os._exit(0)


def serve(plan: Plan, hook: socket.socket, listeners: socket.socket, lock: int, runtime: int) -> NoReturn:
    """Be the shim, in a process that was forked for it."""
    code = 1
    try:
        _become_daemon({hook.fileno(), listeners.fileno(), runtime, lock})
        cgroup.enter(keepers_cgroup(plan.settings))
        Shim(plan, hook, listeners, runtime).serve()
        code = 0
    except BaseException:
        if os.environ.get("GRAFT_DEBUG") and plan.folder is not None:
            with open(plan.folder.with_name("debug.log"), "a") as log:
                traceback.print_exc(file=log)
    finally:
        os._exit(code)


def _become_daemon(keep: set[int]) -> None:
    """Leave the engine's working directory, descriptors and terminal."""
    os.chdir("/")
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    process.close_all_but(keep)
    process.set_process_name("graft-shim")
