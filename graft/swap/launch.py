"""The program's side of `graft run`: what a new process does before it executes the program.

    fork ── cgroup ── namespace ── filter ── (listener to the parent, wait for go) ── rights, ids ── exec

Runs in the child of a single-threaded parent. The filter is installed while the process is still root's, so that
no_new_privs is not needed and set-user-id programs work as usual.

Few imports, because every `graft run` has this module (and no dataclass: `dataclasses` alone takes 5 ms to import).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from graft.errors import GraftError, KernelError
from graft.kernel import capabilities, cgroup, netns, process, seccomp

_HELLO = struct.Struct("=QBB")
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # a shell's exit statuses for a command that it cannot start


class Launch(NamedTuple):
    """A program and where it starts. ``net`` None: a new namespace. ``host_cookie``: the host's namespace.

    ``filter``: which calls its supervisor is notified of, in any other namespace (graft/kernel/seccomp_filter.py).
    """

    command: tuple[str, ...]
    cgroup: Path
    net: Path | None
    host_cookie: int
    user: process.User | None
    keep_net_admin: bool
    signal_mask: frozenset[signal.Signals]
    filter: bytes


class Launched(NamedTuple):
    """A process that waits for `go`. ``listener`` is None in the host's namespace; ``failures`` is a pipe's end.

    ``killable``: only a signal that kills ends the wait of a trapped call.
    """

    pid: int
    netns: int
    listener: int | None
    control: socket.socket
    failures: int
    killable: bool

    def go(self) -> None:
        """Let it execute the program. Raises StartError if it cannot."""
        self.control.send(b"go")
        self.control.close()
        with open(self.failures, "rb") as failures:
            report = failures.read().decode(errors="replace")
        if report:
            os.waitpid(self.pid, 0)
            code, _, message = report.partition(" ")
            raise StartError(message, int(code))


class StartError(GraftError):
    """The command could not be executed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(plan: Launch) -> Launched:
    """Fork, and wait until the child is ready to execute the program. Raises KernelError with the child's message."""
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
        with open(failures, "rb") as reader:
            message = reader.read().decode(errors="replace").partition(" ")[2]
        os.waitpid(pid, 0)
        raise KernelError(message or "the program's process ended before it executed the program")
    cookie, trapped, killable = _HELLO.unpack(hello)
    return Launched(pid, cookie, fds[0] if trapped else None, ours, failures, bool(killable))


def _child(plan: Launch, control: socket.socket, report: int) -> None:
    """Never returns."""
    code, message = 1, ""
    try:
        _prepare(plan, control)
        if control.recv(8) == b"go":
            control.close()
            _execute(plan)
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
        control.send(_HELLO.pack(cookie, 0, 0))
        return
    listener, killable = seccomp.install_listener(plan.filter)
    socket.send_fds(control, [_HELLO.pack(cookie, 1, killable)], [listener])
    os.close(listener)


def _execute(plan: Launch) -> None:
    """Give up the rights that the program must not have, and execute it.

    Root's program keeps root's rights, except for the one capability by which a *socket* would undo its confinement:
    with CAP_NET_ADMIN a socket of the host's stack changes the host's network, or opens its namespace
    (docs/security.md). Root has other ways out (CAP_SYS_ADMIN and setns(2), CAP_SYS_PTRACE, the files of the host),
    and needs no socket for them: to take capabilities away would close none of them to a program that owns every
    file, and would break programs that need them. An untrusted program runs as another user, without root's rights.
    """
    if not plan.keep_net_admin:
        capabilities.drop(capabilities.CAP_NET_ADMIN)
    if plan.user is not None:
        _switch_user(plan.user)
    process.restore_signals(plan.signal_mask)
    os.execvp(plan.command[0], plan.command)


def _switch_user(user: process.User) -> None:
    """Become ``user`` in root's terminal, without access to root by way of the terminal or of root's keys."""
    from graft.kernel import keyring, terminal

    terminal.refuse_terminal_injection()
    keyring.leave_session_keyring()  # while root: the new one counts towards root's quota
    process.switch_user(user)
    if user.uid != 0:
        # The change of ids clears the permitted set, unless the caller's securebits say otherwise. It leaves the
        # inheritable set, which a file's capabilities would make permitted again.
        capabilities.drop_all()
