"""The program's side of `graft run`: what a fresh process does to itself before it becomes the program.

    fork ── cgroup ── namespace ── filter ── (listener to the parent, wait for go) ── rights, ids ── exec

Runs in the child of a single-threaded parent. The filter goes on while the process is still root's, so that
no_new_privs is not needed and set-user-id programs work as ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from graft.errors import GraftError, KernelError
from graft.kernel import capabilities, cgroup, keyring, netns, process, seccomp, terminal

_HELLO = struct.Struct("=QB")
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as a shell ends for a command it cannot start


@dataclass(frozen=True, slots=True)
class Launch:
    """A program and where it starts. ``net`` None: a new namespace. ``host_cookie``: the host's namespace."""

    command: tuple[str, ...]
    cgroup: Path
    net: Path | None
    host_cookie: int
    user: process.User | None
    keep_net_admin: bool
    signal_mask: frozenset[signal.Signals]


@dataclass(frozen=True, slots=True)
class Launched:
    """A process that waits for `go`. ``listener`` is None where it shares the host's namespace."""

    pid: int
    netns: int
    listener: int | None
    control: socket.socket
    failures: int

    def go(self) -> None:
        """Let it become the program. Raises GraftError if it could not."""
        self.control.send(b"go")
        self.control.close()
        with open(self.failures, "rb") as failures:
            said = failures.read().decode(errors="replace")
        if said:
            os.waitpid(self.pid, 0)
            code, _, message = said.partition(" ")
            raise StartError(message, int(code))


class StartError(GraftError):
    """The command could not be executed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(plan: Launch) -> Launched:
    """Fork, and wait until the child stands at the door. Raises KernelError with what it said if it fell."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    failures, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os.close(failures)
        _child(plan, theirs, report)
    theirs.close()
    os.close(report)
    hello, fds, _, _ = socket.recv_fds(ours, _HELLO.size, 1)
    if not hello:
        with open(failures, "rb") as said:
            message = said.read().decode(errors="replace").partition(" ")[2]
        os.waitpid(pid, 0)
        raise KernelError(message or "the program's process ended before it began")
    cookie, trapped = _HELLO.unpack(hello)
    return Launched(pid, cookie, fds[0] if trapped else None, ours, failures)


def _child(plan: Launch, control: socket.socket, report: int) -> None:
    """Never returns."""
    code, message = 1, ""
    try:
        _prepare(plan, control)
        if control.recv(8) == b"go":
            control.close()
            _become(plan)
    except FileNotFoundError as error:
        code, message = NOT_FOUND, f"{plan.command[0]}: {error.strerror}"
    except PermissionError as error:
        code, message = NOT_EXECUTABLE, f"{plan.command[0]}: {error.strerror}"
    except BaseException as error:
        code, message = 1, str(error)
    with contextlib.suppress(OSError):
        os.write(report, f"{code} {message}".encode(errors="replace"))
    os._exit(code)


def _prepare(plan: Launch, control: socket.socket) -> None:
    cgroup.enter(plan.cgroup)
    if plan.net is None:
        netns.unshare_netns()
        netns.bring_lo_up()
    else:
        fd = os.open(plan.net, os.O_RDONLY | os.O_CLOEXEC)
        netns.setns(fd)
        os.close(fd)
    cookie = netns.cookie()
    if cookie == plan.host_cookie:
        control.send(_HELLO.pack(cookie, 0))
        return
    listener, _ = seccomp.install_listener()
    socket.send_fds(control, [_HELLO.pack(cookie, 1)], [listener])
    os.close(listener)


def _become(plan: Launch) -> None:
    """Give up what the program is not to have, and become it.

    Root's program keeps what root has, but for the one capability by which a *socket* would undo its confinement:
    with CAP_NET_ADMIN a socket of the host's stack changes the host's network, or opens its namespace
    (docs/security.md). Other ways out that root has (CAP_SYS_ADMIN and setns(2), CAP_SYS_PTRACE, the files of the
    host) are root's without any socket: taking capabilities away would close none of them to a program that owns
    every file, and break those that need them. What is not to be trusted runs as another user, with nothing of root's.
    """
    if not plan.keep_net_admin:
        capabilities.drop(capabilities.CAP_NET_ADMIN)
    if plan.user is not None:
        _leave_root(plan.user)
    process.restore_signals(plan.signal_mask)
    os.execvp(plan.command[0], plan.command)


def _leave_root(user: process.User) -> None:
    """Become ``user``, in the terminal of root's that started this, but with no way back through it or root's keys."""
    terminal.refuse_terminal_injection()
    keyring.leave_session_keyring()  # while root: the new one is counted as root's, so that no user's quota refuses it
    process.switch_user(user)
    if user.uid != 0:
        # The change of ids takes away what is permitted, unless the caller's securebits say otherwise, and leaves what
        # is inheritable, which a file's capabilities would make permitted again.
        capabilities.drop_all()
