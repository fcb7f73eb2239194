"""The shim: stays beside one container that an OCI runtime started, from before its start until its end.

    wrapper ── shim (listens) ── runc or crun ── createRuntime hook ──▶ attach ── the container's program starts
                                             └── seccomp listeners ──▶ a supervisor for each

A filter's listener comes with each process that the runtime starts in the container: the first one, and one
for every `exec`. The shim is the second keeper of each (graft/swap/keeper.py), so that a supervisor that dies is
started again. When the container's cgroup is empty it takes back rules, attachments, sockets and files.

If the shim itself is killed, the supervisors carry on, and the last of them takes things back; nothing
new can be started in the container then, because the runtime finds nobody at the listener's socket.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path

from graft.datapath.dataplane import keepers_cgroup
from graft.errors import GraftError, RefusedError
from graft.kernel import cgroup, netns, process
from graft.kernel.pidfd import has_ended
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.oci.message_loop import MessageLoop
from graft.oci.state import Message, State
from graft.policy.model import Policy
from graft.state.installation import Installation
from graft.state.records import Container
from graft.swap.keeper import Keeper

HOOK_SOCKET, LISTENER_SOCKET = "hook", "seccomp"
_PATIENCE_MS = 2000


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with one container.

    ``folder`` is the shim's own, None where it has none; ``engine_cgroup`` is where the runtime was started.
    """

    settings: Settings
    policy: Policy
    transport: Transport
    id: str
    folder: Path | None
    engine_cgroup: Path


class Attachment:
    """One container: attached once, with a supervisor for each listener that came."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._graft = Installation(plan.settings)
        self._keepers: list[Keeper] = []
        self._events: int | None = None
        self.container: Container | None = None

    def attach(self, state: State, first: int | None = None) -> None:
        """Put the container that ``state`` tells of under its policy, if it is not yet. Raises GraftError.

        ``first`` is a pidfd of its first process, where that process does not wait for the answer.
        """
        plan = self._plan
        if state.id != plan.id:
            raise RefusedError(f"the container {state.id!r} is not the one that this supervisor waits for")
        if self.container is not None:
            return
        path, cookie = _look(state.pid, plan)
        if first is not None and has_ended(first):
            # Its number may be another process's by now, and what was found by it not the container's.
            raise RefusedError("the container's first process has ended")
        shim = 0 if plan.transport is Transport.DIRECT else os.getpid()
        # A listening Graft that was started anew finds containers that it attached before.
        known = self._graft.containers.at(path) if plan.folder is None else None
        self.container = known or self._create(path, cookie, shim)
        self._events = os.open(path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)

    def _create(self, path: Path, cookie: int, shim: int) -> Container:
        plan = self._plan
        compiled = self._graft.compile(plan.policy)
        with self._graft.transaction() as change:
            return change.containers.create(
                compiled, path, cookie, plan.transport, shim, name=plan.id[:12], engine="oci"
            )

    def take(self, state: State, listener: int, first: int | None = None) -> None:
        """Start a supervisor for a listener, which is this object's from here on, whatever happens.

        ``first``: as for `attach`. Raises GraftError where the listener is not of this container.
        """
        try:
            self.attach(state, first)
            self._check(state.pid)
        except BaseException:
            os.close(listener)
            raise
        plan, container = self._plan, self.container
        assert container is not None
        keeper = Keeper(plan.settings, container, listener, False, lambda graft: _clean(plan, graft, container))
        self._start(keeper)
        self._keepers.append(keeper)

    @staticmethod
    def _start(keeper: Keeper) -> None:
        """Start a supervisor. Where that fails the listener goes, because calls that wait for nobody hang for ever."""
        try:
            keeper.start()
        except BaseException:
            keeper.stop()
            raise

    def _check(self, pid: int) -> None:
        """Raises RefusedError where process ``pid`` (0: nobody said which) does not live in the container."""
        assert self.container is not None
        path = cgroup.of_process(pid) if pid else self.container.cgroup_path
        if not path.is_relative_to(self.container.cgroup_path):
            raise RefusedError(f"process {pid} is in the cgroup {path}, not in the container's")

    def watch(self, loop: MessageLoop) -> None:
        """Have ``loop`` wake when the cgroup fills or empties."""
        if self._events is not None:
            loop.watch(self._events, select.POLLPRI, lambda: None)

    def unwatch(self, loop: MessageLoop) -> None:
        """Undo `watch`."""
        if self._events is not None:
            loop.forget(self._events)

    def look_after(self) -> None:
        """Start supervisors again that died, and let those go whose processes are all gone."""
        for keeper in list(self._keepers):
            if not keeper.reap():
                continue
            self._keepers.remove(keeper)
            if keeper.hung_up():
                keeper.stop()
                continue
            with contextlib.suppress(GraftError, OSError):
                self._start(keeper)
                self._keepers.append(keeper)

    @property
    def over(self) -> bool:
        """Whether the last process of the container is gone."""
        return self._events is not None and _is_empty(self._events)

    def close(self) -> None:
        """Take everything back."""
        for keeper in self._keepers:
            keeper.stop()
        if self._events is not None:
            os.close(self._events)
            self._events = None
        if self.container is not None:
            _take_back(self._graft, self.container)
        _discard(self._plan.folder)


def _look(pid: int, plan: Plan) -> tuple[Path, int]:
    """The cgroup and the namespace's cookie of a container's first process. Raises GraftError, OSError."""
    path = cgroup.of_process(pid)
    top = cgroup.v2_mount()
    if path == top or plan.engine_cgroup.is_relative_to(path):
        raise RefusedError(
            "the container has no cgroup (v2) of its own: it shares its engine's", "an engine that makes one"
        )
    cookie = netns.cookie(Path(f"/proc/{pid}/ns/net"))
    shared = cookie == netns.cookie(plan.settings.host_netns)
    if shared != (plan.transport is Transport.DIRECT):
        raise RefusedError("the container's network namespace is not the one that its configuration told")
    return path, cookie


def _take_back(graft: Installation, container: Container) -> None:
    with contextlib.suppress(GraftError, OSError), graft.transaction() as change:
        change.containers.remove(container)


def _clean(plan: Plan, graft: Installation, container: Container) -> None:
    """What a supervisor without a shim does at its end: the last one of the container takes everything back."""
    if not _empties(container.cgroup_path):
        return
    _take_back(graft, container)
    _discard(plan.folder)


def _discard(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _empties(path: Path) -> bool:
    """Whether a cgroup is empty or gone, or soon will be: a process leaves its filter before its cgroup."""
    try:
        events = os.open(path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    poll = select.poll()
    poll.register(events, select.POLLPRI)
    while not _is_empty(events):
        if not poll.poll(_PATIENCE_MS):
            return False
    return True


def _is_empty(events: int) -> bool:
    """Whether the cgroup of that cgroup.events has no process any more, or is gone."""
    try:
        return b"populated 0" in os.pread(events, 4096, 0)
    except OSError:
        return True


class Shim:
    """Beside one container: messages of its runtime in, supervisors out."""

    def __init__(self, plan: Plan, hook: socket.socket, listeners: socket.socket, runtime: int) -> None:
        self._plan = plan
        self._attachment = Attachment(plan)
        self._failed = False
        self._loop = MessageLoop()
        self._loop.receive(hook, self._attach)
        self._loop.receive(listeners, self._supervise)
        self._loop.watch(runtime, select.POLLIN, lambda: self._runtime_ended(runtime))

    def serve(self) -> None:
        """Until the container is gone, or its runtime ended without having made one."""
        try:
            self._loop.serve(self._turn)
        except BaseException:
            # A fault of ours is as if we were killed: what runs goes on with its supervisors.
            if self._attachment.container is None:
                self._attachment.close()
            raise
        self._loop.close()
        if self._stays_attached:
            _discard(self._plan.folder)
        else:
            self._attachment.close()

    def _turn(self) -> bool:
        self._attachment.look_after()
        return self._failed or self._stays_attached or self._attachment.over

    @property
    def _stays_attached(self) -> bool:
        """Where nothing of Graft has to run for the container, the poststop hook takes its rules back."""
        return self._plan.transport is Transport.DIRECT and self._attachment.container is not None

    def _runtime_ended(self, runtime: int) -> None:
        self._loop.forget(runtime)
        self._failed = self._attachment.container is None

    def _attach(self, message: Message, state: State) -> None:
        try:
            self._attachment.attach(state)
        except (GraftError, OSError) as error:
            message.reply(told(error).encode())
            return
        self._attachment.watch(self._loop)
        message.reply(b"ok")

    def _supervise(self, message: Message, state: State) -> None:
        listener = message.take_listener(state)
        if listener is None:
            return
        # A listener that is not taken is closed: the process's calls fail, and nothing of the host's is reached.
        with contextlib.suppress(GraftError, OSError):
            self._attachment.take(state, listener)


def told(error: GraftError | OSError) -> str:
    """An error as the one line that an operator reads."""
    if isinstance(error, GraftError):
        return error.message + (f" ({error.hint})" if error.hint else "")
    return f"cannot attach the container: {error}"


def listen(path: Path) -> socket.socket:
    """A socket at ``path`` that root only can reach. Raises GraftError where the path is too long."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise GraftError(
            f"cannot listen at {path}: {error}", "GRAFT_RUN_DIR short enough for a socket's path (107 bytes)"
        ) from error
    os.chmod(path, 0o600)
    sock.listen(128)
    sock.setblocking(False)
    return sock


def start(plan: Plan, folder: Path, hook: socket.socket, listeners: socket.socket, lock: int) -> None:
    """Start the shim as a daemon; it ends by itself when the calling process ends without a container.

    ``lock`` is a locked descriptor of ``folder``: while the shim lives, nobody else gets that lock.
    """
    runtime = os.pidfd_open(os.getpid())
    child = os.fork()
    if child:
        os.close(runtime)
        os.waitpid(child, 0)
        return
    code = 1
    try:
        os.setsid()
        if os.fork() == 0:
            _become_daemon({hook.fileno(), listeners.fileno(), runtime, lock})
            cgroup.enter(keepers_cgroup(plan.settings))
            Shim(plan, hook, listeners, runtime).serve()
        code = 0
    except BaseException:
        if os.environ.get("GRAFT_DEBUG"):
            with open(folder.with_name("debug.log"), "a") as log:
                traceback.print_exc(file=log)
    finally:
        os._exit(code)


def _become_daemon(keep: set[int]) -> None:
    """Nothing of the engine's is held: no descriptor, no folder, no signal of its terminal."""
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
