"""One socket for the listeners of many containers: podman with a seccomp profile, and no wrapper around its runtime.

The runtime sends a listener when the container's first process is about to run its program, and waits for
nobody. The program may run a moment before its container is attached; its bind, connect and listen wait until
a supervisor answers them. A container that may not have what it asks for is ended, with the reason in our log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from graft.datapath import dataplane
from graft.errors import GraftError, RefusedError, UsageError
from graft.kernel import cgroup, netns
from graft.kernel.seccomp import hung_up
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.oci import shim
from graft.oci.bundle import has_own_users, read_config
from graft.oci.message_loop import MessageLoop
from graft.oci.options import Options
from graft.oci.request import POLICY_ANNOTATION, check_capabilities, choose_policy, requested
from graft.oci.state import Message, State
from graft.policy.compiler import compile_policy
from graft.state.installation import known_endpoints

Say = Callable[[str], None]


def default_path(settings: Settings) -> Path:
    """Where containers' listeners are taken, unless somebody names another place."""
    return settings.run_dir / "listener"


def serve_listener_socket(settings: Settings, options: Options, path: Path, say: Say) -> None:
    """Serve the containers whose seccomp profile names the socket ``path``, until SIGTERM or SIGINT.

    ``say`` gets a line for each container. Containers that run go on then, served by what was started for
    them. Raises GraftError where the socket cannot be made.
    """
    dataplane.up(settings)
    here = cgroup.of_process(os.getpid())
    cgroup.enter(dataplane.keepers_cgroup(settings))
    with _listening(path) as listening:
        Reception(settings, options, here, say).serve(listening)


@contextlib.contextmanager
def _listening(path: Path):  # type: ignore[no-untyped-def]
    """A socket at ``path``, in the place of one that nobody serves any more."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking, contextlib.suppress(OSError):
        asking.connect(str(path))
        raise UsageError(f"{path}: somebody listens there already", "one `graft listen` serves every container")
    if path.is_socket():
        path.unlink()
    listening = shim.listen(path)
    try:
        yield listening
    finally:
        listening.close()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _pinned(pid: int, listener: int) -> Iterator[int | None]:
    """A pidfd of the process that a message is about; None where the message does not say which, or it has ended.

    For as long as the container likes to draw out what follows, it names that process and no other that is given its
    number. Only a process that the listener's filter is on sends one: where it has gone from all, the number may be
    anybody's by now.
    """
    try:
        process = os.pidfd_open(pid) if pid else None
    except OSError:
        process = None
    try:
        yield None if hung_up(listener) else process
    finally:
        if process is not None:
            os.close(process)


class Reception:
    """Takes listeners of any container, and has each container attached when the first one comes."""

    def __init__(self, settings: Settings, options: Options, engine_cgroup: Path, say: Say) -> None:
        self._settings, self._options, self._here, self._say = settings, options, engine_cgroup, say
        self._attachments: dict[str, shim.Attachment] = {}
        self._loop = MessageLoop()
        self._told_to_end = False

    def serve(self, listening: socket.socket) -> None:
        """Until a signal says that it is enough."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._end)
        self._loop.receive(listening, self._take)
        self._loop.serve(self._turn)
        self._loop.close()

    def _end(self, _signum: int, _frame: object) -> None:
        self._told_to_end = True

    def _turn(self) -> bool:
        for name, attachment in list(self._attachments.items()):
            attachment.look_after()
            if attachment.over:
                attachment.unwatch(self._loop)
                attachment.close()
                del self._attachments[name]
                self._say(f"{name[:12]}: ended")
        return self._told_to_end

    def _take(self, message: Message, state: State) -> None:
        listener = message.take_listener(state)
        if listener is None:
            return
        with _pinned(state.pid, listener) as first:
            try:
                self._attach(state, listener, first)
            except (GraftError, OSError) as error:
                self._refuse(state, error, first)

    def _attach(self, state: State, listener: int, first: int | None) -> None:
        """Attach a container, or give one that is attached another supervisor. ``listener`` is not ours afterwards."""
        known = self._attachments.get(state.id)
        try:
            if known is None and first is None:
                raise RefusedError("the container's first process has ended")
            attachment = known or shim.Attachment(self._plan(state))
        except BaseException:
            os.close(listener)
            raise
        attachment.take(state, listener, first)
        if known is None:
            self._attachments[state.id] = attachment
            attachment.watch(self._loop)
            self._say(f"{state.id[:12]}: attached")

    def _plan(self, state: State) -> shim.Plan:
        """What the container is to have. Raises GraftError where it may not have it."""
        config = read_config(os.path.join(state.bundle, "config.json")) or {"annotations": state.annotations}
        request = requested(config)
        if request is None:
            raise UsageError("it asks for no policy", f"--annotation {POLICY_ANNOTATION}=NAME")
        check_capabilities(config, self._options, has_own_users(config))
        if netns.cookie(Path(f"/proc/{state.pid}/ns/net")) == netns.cookie(self._settings.host_netns):
            raise RefusedError("it shares the host's network namespace, where no listener is needed", "graft attach")
        known = known_endpoints(self._settings)
        policy = choose_policy(self._settings, request, config, self._options, known)
        compile_policy(policy, policy.resolve(known))
        return shim.Plan(self._settings, policy, Transport.SWAP, state.id, None, self._here)

    def _refuse(self, state: State, error: GraftError | OSError, first: int | None) -> None:
        self._say(f"{state.id[:12]}: refused, and ended: {shim.told(error)}")
        if state.id in self._attachments or first is None:
            return  # a process that came later: without a listener its calls fail, and its container goes on
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(first, signal.SIGKILL)
