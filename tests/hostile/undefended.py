"""The command line with one of its defences left out, for controls: an attack that fails must work here.

    python undefended.py DEFENCE run ...

Nothing of this is in the product. What is put back here is what there was before the defence.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from graft import twin

COMMAND = Path(__file__).resolve()


def _signals() -> None:
    def carry_signals(old: int, new: int) -> None:
        fcntl.fcntl(new, 15, fcntl.fcntl(old, 16, struct.pack("=ii", 0, 0)))
        fcntl.fcntl(new, 10, fcntl.fcntl(old, 11))
        fcntl.fcntl(new, fcntl.F_SETFL, fcntl.fcntl(new, fcntl.F_GETFL) | os.O_ASYNC)

    twin._carry_signals = carry_signals


def _shares() -> None:
    """One limit for the connections of all containers."""
    from graft.splice import room, shares

    def may(self: shares.Share, count: int = 1) -> bool:
        return self._of.free >= count

    shares.Share.may = may  # type: ignore[method-assign]
    room.Room.recall = lambda self, count: None  # type: ignore[method-assign]


def _turns() -> None:
    """What the daemon has begun it brings to its end, whoever else waits."""
    from graft.splice import jobs

    def step(self: jobs.Job) -> None:
        error: Exception | None = None
        try:
            for _ in self._steps:
                pass
        except Exception as raised:
            error = raised
        self._end(time.monotonic(), error)

    jobs.Job._step = step  # type: ignore[method-assign]


def _aside() -> None:
    """The daemon waits for the installation's lock in its event loop."""
    from graft.splice import aside

    def run(_self: aside.Aside, call: Callable[[], object], done: Callable[[object, Exception | None], None]) -> None:
        done(call(), None)

    aside.Aside.run = run  # type: ignore[method-assign,assignment]


def _cgroup_id() -> None:
    """A cgroup is known by its path."""
    from graft import containers
    from graft.splice import relays, survey

    containers.Container.is_there = property(lambda self: self.cgroup_path.exists())  # type: ignore[assignment]
    vars(relays)["cgroup_ids"] = lambda path, _root: survey.cgroup_ids(path, 0)


DEFENCES: dict[str, Callable[[], None]] = {
    "signals": _signals,
    "shares": _shares,
    "turns": _turns,
    "aside": _aside,
    "cgroup id": _cgroup_id,
}

if __name__ == "__main__":
    from graft_cli.main import main

    DEFENCES[sys.argv.pop(1)]()
    main()
