"""One socket for the listeners of many containers: podman with a seccomp profile, without a wrapper of its runtime.

The runtime sends a listener when the container's first process is about to run its program, and does not wait for an
answer. The program may run before its container is attached; its bind, connect and listen wait until a supervisor
answers them. A container whose request is refused is killed, and the reason is printed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from graft.datapath import dataplane
from graft.errors import GraftError, NotFoundError, RefusedError, UsageError
from graft.keeper import protocol
from graft.kernel import cgroup, netns, process, unix_files
from graft.kernel.seccomp import hung_up
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.oci import shim
from graft.oci.bundle import has_own_user_namespace, read_config
from graft.oci.message_loop import MessageLoop
from graft.oci.options import RuntimeOptions
from graft.oci.plan import Plan, is_engines_id
from graft.oci.profile_text import BORN_METADATA
from graft.oci.request import POLICY_ANNOTATION, check_annotations, check_capabilities, choose_policy, requested
from graft.oci.state import Message, State
from graft.state import members
from graft.state.compiled_policy import check_transport, compile_for
from graft.state.installation import Installation, known_endpoints
from graft.state.leftovers_aside import LeftoversAside

Report = Callable[[str], None]
STOP_PATIENCE = 0.1
"""Seconds for the supervisors of containers that have ended, all together. They die within a few milliseconds, but for
those that wait in the kernel for the lock of a socket that somebody keeps: the other containers do not wait for it.
"""


def default_path(settings: Settings) -> Path:
    """The default path of the socket that receives containers' listeners."""
    return settings.run_dir / "listener"


def serve_listener_socket(settings: Settings, options: RuntimeOptions, path: Path, report: Report) -> None:
    """Serve the containers whose seccomp profile names the socket ``path``, until SIGTERM or SIGINT.

    ``report`` gets a line for each container. Running containers keep their supervisors afterwards. The socket may be
    the service manager's (sd_listen_fds(3)): containers wait then until this is started. Raises GraftError where the
    socket cannot be made, or is at another path.
    """
    given = _given_socket(path)
    unix_files.pin_own_descriptors()  # a policy's file is opened by its descriptor, for as long as this process lives
    dataplane.up(settings)
    process.raise_descriptor_limit()
    engine_cgroup = cgroup.of_process(os.getpid())
    cgroup.enter(dataplane.keepers_cgroup(settings))
    with _listening(path) if given is None else given as listening:
        ListenerServer(settings, options, engine_cgroup, report).serve(listening)


def _given_socket(path: Path) -> socket.socket | None:
    """The service manager's socket at ``path``, None where it gives none. Raises UsageError for another one."""
    told = {name: os.environ.pop(name) for name in protocol.VARIABLES if name in os.environ}
    given = [fd for fd, _ in protocol.listen_descriptors(told, os.getpid())]
    if not given:
        return None
    os.set_inheritable(given[0], False)
    sock = socket.socket(fileno=given[0])
    if len(given) > 1 or sock.family != socket.AF_UNIX or sock.getsockname() != str(path):
        raise UsageError(f"the service manager's sockets are not the one at {path}", "ListenStream= is its path")
    sock.setblocking(False)
    return sock


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A socket at ``path``; one that no process serves any more is replaced."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, contextlib.suppress(OSError):
        client.connect(str(path))
        raise UsageError(f"{path}: another process is listening there", "one `graft listen` serves every container")
    if path.is_socket():
        path.unlink()
    listening = shim.listen(path)
    try:
        yield listening
    finally:
        listening.close()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _open_process(pid: int, listener: int) -> Iterator[int | None]:
    """A pidfd of the process that a message is about; None where the message does not name one, or it has ended.

    The pidfd never refers to another process that is given the same id, however long a container delays what follows.
    The message comes from a process with the listener's filter: where none has it any more, the id may be another's.
    """
    try:
        first = os.pidfd_open(pid) if pid else None
    except OSError:
        first = None
    try:
        yield None if hung_up(listener) else first
    finally:
        if first is not None:
            os.close(first)


class ListenerServer:
    """Receives listeners of any container, and attaches each container when its first listener arrives."""

    def __init__(self, settings: Settings, options: RuntimeOptions, engine_cgroup: Path, report: Report) -> None:
        self._settings, self._options, self._report = settings, options, report
        self._graft = Installation(settings)
        self._engine_cgroup = engine_cgroup
        self._leftovers = LeftoversAside(self._graft)
        self._attachments: dict[str, shim.Attachment] = {}
        self._loop = MessageLoop()
        self._stopping = False

    def serve(self, listening: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._stop)
        self._loop.receive(listening, self._receive)
        self._loop.serve(self._check_containers)
        self._loop.close()

    def _stop(self, _signum: int, _frame: object) -> None:
        self._stopping = True

    def _check_containers(self) -> bool:
        self._leftovers.go_on()
        for attachment in self._attachments.values():
            attachment.check_supervisors()
        ended = {name: one for name, one in self._attachments.items() if one.has_ended}
        # Also where none has: those that could not die before are reaped.
        shim.stop_supervisors(list(ended.values()), STOP_PATIENCE)
        for name, attachment in ended.items():
            attachment.unwatch(self._loop)
            attachment.close()
            del self._attachments[name]
            self._report(f"{name[:12]}: ended")
        return self._stopping

    def _receive(self, message: Message, state: State) -> None:
        listener = message.take_listener(state)
        if listener is None:
            # Nothing can be done for the process, whose trapped calls fail (ENOSYS).
            self._report(
                f"{state.id[:12]}: refused: its message has no seccomp listener, or there was no descriptor left"
            )
            return
        with _open_process(state.pid, listener) as first:
            try:
                self._attach(state, listener, first, message.sender)
            except (GraftError, OSError) as error:
                self._refuse(state, error, first)

    def _attach(self, state: State, listener: int, first: int | None, runtime: int) -> None:
        """Start a supervisor for ``listener``, which is closed where that fails; attach a new container first.
        ``runtime`` is the process that has sent it.
        """
        known = self._attachments.get(state.id)
        try:
            if known is None and not state.pid:  # crun, for an `exec`: it says of which container, and no more
                raise RefusedError(
                    "its message names no process, and this `graft listen` has not attached the container",
                    "start the container again",
                )
            if known is None and first is None:
                raise RefusedError("the container's first process has ended")
            attachment = known or shim.Attachment(self._plan(state, runtime), self._graft, self._leftovers.closed_after)
        except BaseException:
            os.close(listener)
            raise
        attachment.start_supervisor(state, listener, first)
        if known is None:
            self._attachments[state.id] = attachment
            attachment.watch(self._loop)
            self._report(f"{state.id[:12]}: attached")

    def _cgroup_of_engine(self, state: State, runtime: int) -> Path | None:
        """Where the container's runtime was started, None where that has ended. (An engine's containers have its id in
        their cgroup's name, and are judged by that.)
        """
        if not runtime or is_engines_id(state.id):
            return self._engine_cgroup
        try:
            return members.answer_about(f"the runtime of {state.id[:12]} in /proc", partial(cgroup.of_process, runtime))
        except FileNotFoundError:
            return None

    def _plan(self, state: State, runtime: int = 0) -> Plan:
        """How to attach the container. Raises GraftError where its request is refused."""
        path = os.path.join(state.bundle, "config.json")
        config = read_config(path)
        if config is None:  # it says which engine wrote the annotations, and which capabilities the container has
            raise NotFoundError(
                f"{path} not found", "where `graft listen` runs, the bundles of containers must be seen"
            )
        request = requested(config)
        if request is None:
            raise UsageError("the container asks for no policy", f"--annotation {POLICY_ANNOTATION}=NAME")
        check_annotations(config, self._options, notified=True)
        is_apart = members.answer_about(f"container {state.id[:12]} in /proc", partial(has_own_user_namespace, config))
        check_capabilities(config, self._options, is_apart)
        if netns.cookie(Path(f"/proc/{state.pid}/ns/net")) == netns.cookie(self._settings.host_netns):
            raise RefusedError(
                "the container shares the host's network namespace, where no listener is needed", "graft attach"
            )
        known = known_endpoints(self._settings)
        choose = partial(choose_policy, self._settings, request, config, self._options, known)
        policy = members.answer_about(f"the policy {request.value}", choose)
        compiled = compile_for(policy, policy.resolve(known))
        transport = Transport.BORN if state.metadata == BORN_METADATA else Transport.SWAP
        check_transport(transport, state.id[:12], compiled)
        return Plan(
            self._settings,
            policy,
            transport,
            state.id,
            None,
            self._cgroup_of_engine(state, runtime),
            datagrams=compiled.bears_datagrams,
        )

    def _refuse(self, state: State, error: GraftError | OSError, first: int | None) -> None:
        if state.id in self._attachments or not state.pid:
            # A later process: its calls fail without a supervisor, and its container keeps running.
            self._report(f"{state.id[:12]}: refused: {shim.describe(error)}")
            return
        self._report(f"{state.id[:12]}: refused, and ended: {shim.describe(error)}")
        if first is None:
            return
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(first, signal.SIGKILL)
