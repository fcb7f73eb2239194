"""The command line with one of its defences left out, for controls: an attack that fails must work here.

    python undefended.py DEFENCE run ...

Nothing of this is in the product. What is put back here is what there was before the defence.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from graft import twin
from graft.kernel import capabilities, keyring, terminal
from graft.kernel.syscalls import syscall
from graft.runtime import listen
from graft.runtime.state import State

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


DEFENCES: dict[str, Callable[[], None]] = {
    "signals": _signals,
    "terminal": _terminal,
    "keyring": _keyring,
    "capabilities": _capabilities,
    "listener": _listener,
}

if __name__ == "__main__":
    from graft_cli.main import main

    DEFENCES[sys.argv.pop(1)]()
    main()
