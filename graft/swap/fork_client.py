"""How a command gets a process that has everything loaded: a child of the fork server (graft/kernel/fork_server.py).

The server is started by the first command that needs one, and ends when it has not been needed for a while. There is
one for each kind of surroundings that commands are started in (graft/kernel/surroundings.py). A command for which there
is none, or that gets no answer from it, does its work by itself; so does one that is answered by a process that is not
as itself is: it gets the command's descriptors, and rules what the program becomes. Few imports: every `graft run` has
this module.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from graft.kernel import peers, surroundings
from graft.kernel.fork_messages import ASK, HELLO
from graft.kernel.peers import Peer
from graft.kernel.surroundings import Surroundings
from graft.model.settings import Settings

NO_SERVER = "GRAFT_NO_FORK_SERVER"
"""In the environment, not empty: each command does its work by itself."""
MODULE = "graft_cli.fork_server"
LOOKED, READY = b"-", b"+"
"""What a new server says: it depends on nobody else from now on; it can be connected to."""
_INHERITED = ("PATH", "PYTHONPATH", "LANG")
_LOOK_SECONDS = 3.0  # until a new server has looked at itself, for which somebody else may have it wait
_START_SECONDS = 20.0
_FAILED_SECONDS = 60.0
_HELLO_SECONDS = 20.0  # many clients at once have to wait for each other
_LOOK_MILLISECONDS = 100
LOCK = ".lock"
_LOCK_PAUSE = 0.005


def folder_of(settings: Settings) -> Path:
    """The folder of the servers' sockets and locks, for root only."""
    return settings.run_dir / "forks"


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether a server may be used."""
    return not environment.get(NO_SERVER)


class Connected(NamedTuple):
    """A connection to a child of a server, and a descriptor of the file that is the server's socket: who connects to
    that reaches the same server, or none, whatever is at its path by then.
    """

    sock: socket.socket
    file: int


def connect(settings: Settings) -> Connected | None:
    """A connection to the server, which is started where there is none; None where there can be none."""
    try:
        own = surroundings.of()
        if own.is_filtered:
            return None
        if _has_failed(settings, own.name):
            return None
        found = _connect(settings, own.name, own)
        if found is None:
            folder_of(settings).mkdir(mode=0o700, parents=True, exist_ok=True)
            with lock(settings, f"{own.name}-start"):  # many commands at once start one
                found = _connect(settings, own.name, own)
                if found is None and not _has_failed(settings, own.name):
                    if not _start(settings, own.name):
                        _note_failure(settings, own.name)
                        return None
                    found = _connect(settings, own.name, own)
        return found
    except _NoAnswer:
        _note_failure(settings, own.name)
    except OSError:
        pass
    return None


class _NoAnswer(TimeoutError):
    """There is a server, which is not stopped, and nobody answers for it: the next command would wait as long."""


def connect_to(settings: Settings, name: str) -> socket.socket | None:
    """A connection to a child of the server of that name; None where there is no server, or it forks none."""
    with contextlib.suppress(OSError):
        found = _connect(settings, name, surroundings.of())
        if found is not None:
            os.close(found.file)
            return found.sock
    return None


def _connect(settings: Settings, name: str, own: Surroundings) -> Connected | None:
    """The same. Raises TimeoutError where there is a server that forks none: then there can be no other one."""
    with contextlib.ExitStack() as undo:
        try:
            file = _open_socket(settings, name)
            undo.callback(os.close, file)
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            peers.name_senders(sock)
            sock.setblocking(False)  # not to wait until a server that is stopped accepts others
            sock.connect(f"/proc/self/fd/{file}")
            sock.setblocking(True)
            if _is_answered(sock, own):
                peers.name_senders(sock, wanted=False)
                undo.pop_all()
                return Connected(sock, file)
        except TimeoutError:
            raise
        except OSError:
            pass
    return None


def _open_socket(settings: Settings, name: str) -> int:
    """A descriptor of a server's socket, as a file: not of what a link leads to."""
    folder = os.open(folder_of(settings), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)


def connect_to_another(settings: Settings) -> socket.socket:
    """A connection to a process that is started for it, and does what a child of the server would. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        starter = spawn(settings, ["serve-one"], theirs.fileno())
    os.waitpid(starter, 0)
    if not _is_answered(ours):
        ours.close()
        raise OSError("no process can be started")
    return ours


def _is_answered(sock: socket.socket, own: Surroundings | None = None) -> bool:
    """Whether somebody is there for this connection, with ``own`` one that is as this process; False where it hung up.

    Raises TimeoutError where the process that listens is stopped, or does not get to it; OSError.
    """
    _wait_for_answer(sock)
    said, sender = peers.hear(sock)
    if said != HELLO:
        return False
    if own is None:
        sock.send(ASK)
        _wait_for_answer(sock)
        return sock.recv(1) == HELLO
    with contextlib.closing(Peer(sock, sender)) as child:
        sock.send(ASK)
        _wait_for_answer(sock)
        return child.hear() == HELLO and child.is_like(own)


def _wait_for_answer(sock: socket.socket) -> None:
    server, deadline = surroundings.peer_pid(sock), time.monotonic() + _HELLO_SECONDS  # of a pair: this process
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while not poll.poll(_LOOK_MILLISECONDS):
        if server != os.getpid() and _is_stopped(server):
            raise TimeoutError
        if time.monotonic() > deadline:
            raise _NoAnswer


def _is_stopped(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b") ")[2][:1] in (b"T", b"t")


@contextlib.contextmanager
def address(settings: Settings, name: str) -> Iterator[str]:
    """A path of that server's socket that fits into struct sockaddr_un (unix(7)), however long run_dir is."""
    folder = os.open(folder_of(settings), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{name}"
    finally:
        os.close(folder)


@contextlib.contextmanager
def lock(settings: Settings, name: str, wait: bool = True) -> Iterator[None]:
    """Have the lock of that name, until the block ends or this process dies; its id is in the file. Raises
    BlockingIOError, with ``wait`` after a time: who has it may be stopped.
    """
    fd = os.open(folder_of(settings) / f"{name}{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(fd, time.monotonic() + (_START_SECONDS if wait else 0))
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d" % os.getpid(), 0)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_LOCK_PAUSE)


def _has_failed(settings: Settings, name: str) -> bool:
    """Whether none could be started just now: nobody waits for another attempt."""
    try:
        passed = time.monotonic() - float(_failure(settings, name).read_bytes())
    except (OSError, ValueError):
        return False
    return 0 <= passed < _FAILED_SECONDS  # less than 0: from before a boot


def _note_failure(settings: Settings, name: str) -> None:
    with contextlib.suppress(OSError):
        _failure(settings, name).write_bytes(b"%f" % time.monotonic())


def _failure(settings: Settings, name: str) -> Path:
    return folder_of(settings) / f"{name}.failed"


def _start(settings: Settings, name: str) -> bool:
    """Start a server, which outlives the caller and gets nothing from it but the settings; whether it is ready."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        starter = spawn(settings, ["serve", name], writer)
    finally:
        os.close(writer)
    with open(reader, "rb", buffering=0) as said:
        has_looked = _reads(said, LOOKED, _LOOK_SECONDS)
        is_ready = has_looked and _reads(said, READY, _START_SECONDS)
    if not is_ready:
        os.kill(starter, signal.SIGKILL)  # where it has not left a child yet
    os.waitpid(starter, 0)
    return is_ready


def _reads(file: FileIO, byte: bytes, seconds: float) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(seconds * 1000)) and file.read(1) == byte


def spawn(settings: Settings, words: list[str], fd: int) -> int:
    """Start the module of the server, with ``fd`` as its descriptor 3; gives its process."""
    command, environment = command_and_environment(settings, words)
    null, moved = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, fd, 3)
    return os.posix_spawn(
        command[0],
        command,
        environment,
        file_actions=[null, (os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2), moved],
        setsigmask=(),
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        setsid=True,
    )


def command_and_environment(settings: Settings, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """How to start the module of the server."""
    inherited = {name: value for name, value in os.environ.items() if name in _INHERITED}
    return [sys.executable, "-P", "-m", MODULE, *words], {**inherited, **settings.environment}
