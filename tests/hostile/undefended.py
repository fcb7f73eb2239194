"""The command line with one of its defences left out, for controls: an attack that fails must work here.

    python undefended.py DEFENCE run ...

Nothing of this is in the product. What is put back here is what there was before the defence.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from graft import descriptors, expendable, held, liveness, twin
from graft.containers import Container
from graft.kernel import capabilities, cgroup, keyring, sockets, terminal
from graft.kernel.pidfd import pidfd_getfd
from graft.kernel.syscalls import syscall
from graft.runtime import listen
from graft.runtime.state import State
from graft.settings import Settings

COMMAND = Path(__file__).resolve()


def _signals() -> None:
    def carry_signals(old: int, new: int) -> None:
        fcntl.fcntl(new, 15, fcntl.fcntl(old, 16, struct.pack("=ii", 0, 0)))
        fcntl.fcntl(new, 10, fcntl.fcntl(old, 11))
        fcntl.fcntl(new, fcntl.F_SETFL, fcntl.fcntl(new, fcntl.F_GETFL) | os.O_ASYNC)

    twin._carry_signals = carry_signals


def _terminal() -> None:
    terminal.refuse_typing = lambda: None


def _keyring() -> None:
    keyring.leave_session_keyring = lambda: None


def _capabilities() -> None:
    def give_up(capability: int) -> None:
        syscall("prctl", 24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, and no other set

    capabilities.give_up = give_up


def _listener() -> None:
    def refuse(self: listen.Reception, state: State, error: Exception, first: int | None) -> None:
        self._say(f"{state.id}: refused, and ended: {error}")
        os.kill(state.pid, 9)

    listen.Reception._refuse = refuse  # type: ignore[method-assign]


def _asking() -> None:
    """What was asked of a container's sockets was asked by the command itself, of a copy of each."""

    def each(work: Callable[[Any], Any], items: Sequence[Any], patience: float = 0, finish: bool = False) -> Any:
        return expendable.Done({number: work(item) for number, item in enumerate(items)}, 0)

    def one(work: Callable[[], Any], patience: float = 0) -> Any:
        return work()

    def find(pids: Iterable[int], inodes: frozenset[int]) -> descriptors.Places:
        found = looked_up(pids, inodes)
        for place in (place for places in found.values() for place in places):
            with socket.socket(fileno=pidfd_getfd(os.pidfd_open(place.pid), place.fd)):
                pass  # which asks it for its family and its name
        return found

    looked_up = descriptors.find
    expendable.each, expendable.one, descriptors.find = each, one, find


def _tags() -> None:
    """A container's sockets were those of its processes, and of a process those of its first thread."""

    def of(settings: Settings, listed: Sequence[Container], stack: held.HostStack) -> Any:
        found = by_tags(settings, listed, stack)
        for container in listed:
            inside = cgroup.processes(container.cgroup_path)
            found[container.id] = [
                one
                for one in found[container.id]
                if any(place.pid in inside and place.tid == place.pid for place in one.places)
            ]
        return found

    by_tags: Any = held.of
    held.of = of  # type: ignore[assignment]


def _destroy() -> None:
    """A kernel that is not to be asked to end a socket."""
    sockets.can_destroy = lambda release=None: False


def _listing() -> None:
    """A kernel that does not answer (before 6.9: anybody who ends a socket of his own that is locked sees to that)."""
    sockets.listed = lambda storage: threading.Event().wait()  # type: ignore[assignment, return-value]


def _liveness() -> None:
    liveness.stuck = lambda pids, seconds=0: frozenset()


DEFENCES: dict[str, Callable[[], None]] = {
    "signals": _signals,
    "terminal": _terminal,
    "keyring": _keyring,
    "capabilities": _capabilities,
    "listener": _listener,
    "asking": _asking,
    "tags": _tags,
    "destroy": _destroy,
    "listing": _listing,
    "liveness": _liveness,
}

if __name__ == "__main__":
    from graft_cli.main import main

    DEFENCES[sys.argv.pop(1)]()
    main()
