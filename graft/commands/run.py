"""`graft run`: a program under Graft, as if it had been started directly.

Three processes: this one, which the user's shell knows, waits for the program and passes signals on; the
program; and its supervisor (graft/swap/keeper.py). This one holds the listener too, so that either of Graft's two
can die: a supervisor is started again, and if this one is killed, the supervisor ends the program and cleans
up, because what a shell started must not run on when the shell's child is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graft.kernel import cgroup, netns, process
from graft.model.transport import Transport
from graft.policy.model import Policy
from graft.state.installation import Installation
from graft.state.records import Container
from graft.swap.keeper import Keeper, end_container
from graft.swap.launch import Launch, Launched, launch

_SI_KERNEL = 0x80  # include/uapi/asm-generic/siginfo.h: here, from the terminal
_NOT_OURS = {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What to run. ``net`` None: a new namespace with lo. ``user`` None: as the caller is."""

    command: tuple[str, ...]
    policy: Policy
    net: Path | None = None
    user: process.User | None = None
    keep_net_admin: bool = False
    verbose: bool = False


def run(graft: Installation, plan: RunPlan) -> int:
    """Run a program to its end, and give its exit status; a negative one is the signal that ended it.

    Raises GraftError where it cannot be started; nothing is left behind then either.
    """
    path = cgroup.v2_mount() / graft.settings.cgroup / f"run-{os.getpid()}"
    path.mkdir(parents=True, exist_ok=True)
    try:
        with _signals_held() as mask:
            return _run_in(graft, plan, path, mask)
    finally:
        if path.exists():
            cgroup.kill(path)
            cgroup.remove(path)


@contextlib.contextmanager
def _signals_held() -> Iterator[frozenset[signal.Signals]]:
    """Every signal that can be passed on, held back to be waited for; gives the mask of before."""
    held = set(signal.valid_signals()) - _NOT_OURS
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield frozenset(signal.Signals(one) for one in before if one in list(signal.Signals))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_in(graft: Installation, plan: RunPlan, path: Path, mask: frozenset[signal.Signals]) -> int:
    compiled = graft.compile(plan.policy)
    host = netns.cookie(graft.settings.host_netns)
    launched = launch(Launch(plan.command, path, plan.net, host, plan.user, plan.keep_net_admin, mask))
    container: Container | None = None
    keeper: Keeper | None = None
    try:
        transport = Transport.DIRECT if launched.listener is None else Transport.SWAP
        with graft.transaction() as change:
            container = change.containers.create(compiled, path, launched.netns, transport, os.getpid())
        if launched.listener is not None:
            keeper = Keeper(graft.settings, container, launched.listener, plan.verbose)
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


def _wait(launched: Launched, keeper: Keeper | None) -> int:
    """Until the program ends: pass signals on, stop when it stops, keep a supervisor alive."""
    held = set(signal.valid_signals()) - _NOT_OURS
    while True:
        info = signal.sigwaitinfo(held)
        if info.si_signo != signal.SIGCHLD:
            # What a terminal sends, it sends to the whole foreground group: the program has it already.
            if info.si_code != _SI_KERNEL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(launched.pid, info.si_signo)
            continue
        status = _look(launched.pid)
        if status is not None:
            return status
        if keeper is not None and keeper.reap():
            keeper.start()


def _look(pid: int) -> int | None:
    """The program's exit status, if it has ended. If it has stopped, so do we, until somebody goes on."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if found == 0:
            return None
        if os.WIFSTOPPED(status):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif os.WIFEXITED(status) or os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)
