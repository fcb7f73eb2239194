"""`graft run`: runs a program under Graft, as if it had been started directly.

Three processes: this one, the shell's child, waits for the program and passes signals on; the program; and its
supervisor (graft/swap/keeper.py). This process has the seccomp listener too, so that either of Graft's two may die: it
starts another supervisor; and if this process is killed, the supervisor kills the program and cleans up, because a
shell's command must not continue after the shell's child has gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graft.kernel import cgroup, netns, process
from graft.kernel.seccomp_filter import born_filter, swap_filter
from graft.model.transport import Transport
from graft.policy.model import Policy
from graft.policy.validator import refuse_without_supervisor
from graft.splice import client as splice
from graft.state.changed_policy import refuse_changed
from graft.state.compiled_policy import CompiledPolicy
from graft.state.installation import Installation
from graft.state.records import Container
from graft.swap.keeper import Keeper
from graft.swap.launch import Launch, Launched, launch
from graft.swap.supervision import end_container

_SI_KERNEL = 0x80  # include/uapi/asm-generic/siginfo.h; from the terminal here
_NOT_FORWARDED = {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What to run. ``net`` None: in a new namespace with lo. ``user`` None: as the caller."""

    command: tuple[str, ...]
    policy: Policy
    net: Path | None = None
    user: process.User | None = None
    keep_net_admin: bool = False
    verbose: bool = False


def run(graft: Installation, plan: RunPlan) -> int:
    """Run a program until it exits, and return its exit status; a negative one is the signal that killed it.

    Raises GraftError if it cannot be started. Leaves nothing behind in either case.
    """
    path = cgroup.v2_mount() / graft.settings.cgroup / f"run-{os.getpid()}"
    cgroup.make(path)
    try:
        with _signals_blocked() as mask:
            return _run_in(graft, plan, path, mask)
    finally:
        if path.exists():
            cgroup.kill(path)
            cgroup.remove(path)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[frozenset[signal.Signals]]:
    """Block every signal that is forwarded, to wait for it; yields the signal mask from before."""
    blocked = set(signal.valid_signals()) - _NOT_FORWARDED
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield frozenset(signal.Signals(one) for one in before if one in list(signal.Signals))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_in(graft: Installation, plan: RunPlan, path: Path, mask: frozenset[signal.Signals]) -> int:
    compiled = graft.compile(plan.policy)
    launched = launch(launch_of(graft, plan, compiled, path, mask))
    container: Container | None = None
    keeper: Keeper | None = None
    try:
        container = attach(graft, plan, compiled, path, launched, os.getpid())
        if launched.listener is not None:
            keeper = Keeper(
                graft.settings,
                container,
                launched.listener,
                plan.verbose,
                killable=launched.killable,
                datagrams=compiled.bears_datagrams,
            )
            keeper.start()
        launched.go()
        return _wait(launched, keeper)
    finally:
        cgroup.kill(path)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(launched.pid, 0)
        if keeper is not None:
            keeper.stop()
        if container is not None:
            end_container(graft, container)
            if container.is_relayed:
                splice.detach(graft, container)


def launch_of(
    graft: Installation, plan: RunPlan, compiled: CompiledPolicy, path: Path, mask: frozenset[signal.Signals]
) -> Launch:
    """How to start the program of ``plan`` in the cgroup at ``path``."""
    born = compiled.supervised_transport is Transport.BORN
    return Launch(
        plan.command,
        path,
        plan.net,
        netns.cookie(graft.settings.host_netns),
        plan.user,
        plan.keep_net_admin,
        mask,
        born_filter() if born else swap_filter(datagrams=compiled.bears_datagrams),
    )


def attach(
    graft: Installation, plan: RunPlan, compiled: CompiledPolicy, path: Path, launched: Launched, keeper: int
) -> Container:
    """Make the container of a program that was launched; ``keeper`` is the process that waits for it."""
    transport = Transport.DIRECT if launched.listener is None else compiled.supervised_transport
    refuse_without_supervisor(plan.policy, transport)
    graft.reap()
    with graft.transaction() as change:
        container = change.containers.create(compiled, path, launched.netns, transport, keeper)
    refuse_changed(graft, container, plan.policy)
    splice.serve(graft, container, launched.pid)
    return container


def _wait(launched: Launched, keeper: Keeper | None) -> int:
    """Until the program exits: forward signals, stop when it stops, keep a supervisor running."""
    blocked = set(signal.valid_signals()) - _NOT_FORWARDED
    while True:
        info = signal.sigwaitinfo(blocked)
        if info.si_signo != signal.SIGCHLD:
            # A terminal sends a signal to the whole foreground group: the program has received it.
            if info.si_code != _SI_KERNEL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(launched.pid, info.si_signo)
            continue
        status = _exit_status(launched.pid)
        if status is not None:
            return status
        if keeper is not None and keeper.reap():
            keeper.start()


def _exit_status(pid: int) -> int | None:
    """The program's exit status, if it has exited. If it is stopped, this process stops too, until SIGCONT."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if found == 0:
            return None
        if os.WIFSTOPPED(status):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif os.WIFEXITED(status) or os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)
