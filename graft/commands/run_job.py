"""What children of the fork server do for `graft run` (run_client.py): prepare it, supervise its program, and end it.

`start` does what `run` in run.py does, for a program that another process starts and waits for. The container's name,
cgroup and keeper are that process's; so are the working directory, the environment and the streams of this one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

from graft.commands.run import RunPlan, attach, launch_of
from graft.datapath.maps import NotUpError
from graft.errors import GraftError, KernelError
from graft.kernel import cgroup, fork_messages, process, surroundings
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.splice import client as splice
from graft.state import records
from graft.state.installation import Installation
from graft.state.records import Container
from graft.swap import fork_client
from graft.swap.launch import Launch, Launched, StartError
from graft.swap.supervision import Supervision, end_container, supervise

_KILL_SECONDS = 5.0


class Client(NamedTuple):
    """A `graft run` that this process prepares. ``keeper`` is a pidfd of it."""

    connection: socket.socket
    pid: int
    keeper: int


class ClientDied(Exception):
    """The client is gone; so is its program, or it soon will be."""


# ---- preparing ---------------------------------------------------------------------------------------


def prepare(
    connection: socket.socket,
    request: dict[str, Any],
    fds: Sequence[int],
    command: Callable[[list[str], Client], object],
) -> None:
    """Be the ``command`` of a client, as if it had been started with the client's words, streams and environment.

    ``command`` calls `start`, unless it fails before that.
    """
    *streams, cwd, keeper = fds
    os.fchdir(cwd)
    os.close(cwd)
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    out, errors = request["encodings"]
    sys.stdout, sys.stderr = _reopened(1, out), _reopened(2, errors)
    process.set_process_name("graft-starts")
    code: object = 0
    try:
        command(request["words"], Client(connection, request["pid"], keeper))
    except SystemExit as error:
        code = error.code
    except ClientDied:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    with contextlib.suppress(OSError):
        fork_messages.send(connection, {"exit": code if isinstance(code, int) else int(code is not None)})


def _reopened(fd: int, encoding: list[str] | None) -> TextIO:
    name, errors = encoding or (None, None)
    return open(fd, "w", buffering=1, encoding=name, errors=errors, closefd=False)


def start(client: Client, graft: Installation, plan: RunPlan) -> None:
    """Make the container of ``plan``, with a program that ``client`` starts and waits for. Raises GraftError: then
    nothing is left behind.
    """
    path = cgroup.v2_mount() / graft.settings.cgroup / f"run-{client.pid}"
    cgroup.make(path)
    container: Container | None = None
    try:
        compiled = graft.compile(plan.policy)
        launched = _launch(client, launch_of(graft, plan, compiled, path, frozenset()))
        container = attach(graft, plan, compiled, path, launched, client.pid)
        _go(client, graft.settings, container, launched, plan.verbose, compiled.bears_datagrams)
    except BaseException:
        cgroup.kill(path)
        if container is not None:
            _remove(graft, container)
        if path.exists():
            cgroup.remove(path)
        raise


def _receive(client: Client) -> tuple[dict[str, Any], list[int]]:
    """The client's next message. Raises ClientDied, and what the client failed with."""
    try:
        message, fds = fork_messages.receive(client.connection)
    except (EOFError, OSError, ValueError):
        raise ClientDied from None
    if "failed" not in message:
        return message, fds
    if "exit" in message:
        raise StartError(message["failed"], message["exit"])
    raise KernelError(message["failed"], message.get("hint"))


def _send(client: Client, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    try:
        fork_messages.send(client.connection, message, fds)
    except OSError:
        raise ClientDied from None


def _launch(client: Client, plan: Launch) -> Launched:
    """`launch.launch` by the client. The result cannot `go`."""
    message = plan._asdict() | {
        "cgroup": str(plan.cgroup),
        "net": None if plan.net is None else str(plan.net),
        "filter": plan.filter.hex(),
        "signal_mask": None,
    }
    _send(client, {"launch": message})
    answer, fds = _receive(client)
    found = answer["launched"]
    return Launched(found["pid"], found["netns"], fds[0] if fds else None, client.connection, -1, found["killable"])


def _go(
    client: Client, settings: Settings, container: Container, launched: Launched, verbose: bool, datagrams: bool
) -> None:
    """Start a supervisor, if there is anything to supervise, and let the program start."""
    own = {name: value for name, value in os.environ.items() if name.startswith("GRAFT_")}
    common = {"environment": own | settings.environment, "container": records.encode(container)}
    start = common | {"do": "supervise", "verbose": verbose, "killable": launched.killable, "datagrams": datagrams}
    end = common | {"do": "end"}
    raw = fork_messages.encode(start)
    name = surroundings.of().name
    command, variables = fork_client.command_and_environment(settings, ["serve-one"])
    state = {
        "name": container.name,
        "start": os.fsdecode(raw),
        "end": os.fsdecode(fork_messages.encode(end)),
        "command": command,
        "environment": [f"{key}={value}" for key, value in variables.items()],
    }
    if launched.listener is None:
        _send(client, {"wait": state})
    else:
        journal = os.memfd_create("graft-journal")
        os.ftruncate(journal, mmap.PAGESIZE)
        control, supervisor = _start_supervisor(settings, name, raw, [launched.listener, journal, client.keeper])
        _send(client, {"wait": state}, [control.detach(), supervisor, journal])
    _receive(client)


def _start_supervisor(settings: Settings, name: str, request: bytes, fds: list[int]) -> tuple[socket.socket, int]:
    """Start a supervisor, as a child of the server if that is possible: a socket that hangs up when it dies, and its
    pidfd.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            with fork_client.connect_to(settings, name) or fork_client.connect_to_another(settings) as server:
                fork_messages.send_encoded(server, request, [*fds, theirs.fileno(), 2])
                answer, received, _, _ = socket.recv_fds(server, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise KernelError(f"cannot start a supervisor: {error.strerror or error}") from error
    if not answer or not received:
        raise KernelError("cannot start a supervisor: its process has died")
    return ours, received[0]


# ---- supervising -------------------------------------------------------------------------------------


def supervise_container(connection: socket.socket, request: dict[str, Any], fds: Sequence[int]) -> None:
    """Be the supervisor of a container. Never returns."""
    listener, journal, keeper, control, errors = fds
    os.environ.update(request["environment"])
    os.dup2(errors, 2)
    process.set_process_name("graft-supervise")
    own = os.pidfd_open(os.getpid())
    socket.send_fds(connection, [b"+"], [own])
    os.close(own)
    supervise(
        Supervision(
            Settings.from_environment(),
            records.decode(request["container"]),
            listener,
            mmap.mmap(journal, mmap.PAGESIZE),
            keeper,
            request["verbose"],
            request["killable"],
            request["datagrams"],
            others=(control,),
        )
    )


# ---- ending ------------------------------------------------------------------------------------------


def end(connection: socket.socket, request: dict[str, Any], fds: Sequence[int]) -> None:
    """End a container whose program has ended. Answers with the exit status for a failure, or 0."""
    errors, *supervisor = fds
    os.environ.update(request["environment"])
    os.dup2(errors, 2)
    code = 0
    try:
        container = records.decode(request["container"])
        cgroup.kill(container.cgroup_path)
        for pidfd in supervisor:
            _kill(pidfd)
        _remove(Installation(Settings.from_environment()), container)
    except NotUpError:  # `graft down --force` has ended it, and removed all
        print("graft: ended by graft down", file=sys.stderr, flush=True)
    except GraftError as error:
        print(*(printable(line) for line in error.lines()), sep="\n", file=sys.stderr, flush=True)
        code = error.exit_code
    connection.send(bytes([code]))


def _kill(pidfd: int) -> None:
    """Kill a supervisor, and wait for its end, unless it waits in the kernel for another container."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(_KILL_SECONDS * 1000)


def _remove(graft: Installation, container: Container) -> None:
    end_container(graft, container)
    if container.is_relayed:
        splice.detach(graft, container)
