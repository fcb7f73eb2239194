"""`graft up`: loads the BPF programs, and restores what is saved."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial

from graft.commands import watcher_process
from graft.commands.renew import renew
from graft.commands.restore import Restored, restore
from graft.commands.stale import remove_stale
from graft.datapath import dataplane
from graft.errors import GraftError
from graft.kernel.credentials import require_root
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.state import dropped, restored
from graft.state.installation import Installation


def bring_up(settings: Settings, only_if_new: bool = False) -> Restored:
    """Make the data plane, if it is not there, or replace the hooks in force, if they are not this Graft's; and restore
    what is saved and not in force.

    ``only_if_new``: restore nothing where that was done already, and leave the hooks. Raises PrivilegeError,
    KernelError, ConflictError, RefusedError; also after it has restored, where the hooks could not be replaced.
    """
    require_root()
    dataplane.up(settings)
    with _raised_afterwards(partial(renew, settings) if not only_if_new else lambda: None):
        return _restore(settings, only_if_new)


@contextlib.contextmanager
def _raised_afterwards(first: Callable[[], object]) -> Iterator[None]:
    """Do something first; what it raises of Graft's errors is raised when the block is done."""
    problem = None
    try:
        first()
    except GraftError as error:
        problem = error
    yield
    if problem is not None:
        raise problem


def _restore(settings: Settings, only_if_new: bool) -> Restored:
    with restored.only_one(settings), Installation(settings) as graft:
        is_new = not restored.is_restored(settings)
        if only_if_new and not is_new:
            return Restored()
        if is_new:  # what was changed for now stays so: a boot or `graft down` ends that, and no lost data plane
            dropped.forget(settings)
            remove_stale(graft)
        try:
            done = restore(graft)
        except BaseException:
            watcher_process.ensure_running(settings)  # what failed may pass: it tries again
            raise
        finally:
            restored.set_restored(settings)
    if (done.state.attachments or done.problems) and not watcher_process.ensure_running(settings):
        done.problems += watcher_process.warnings(settings)
    return done


def lines_of(done: Restored) -> list[str]:
    """What an operator has to know of it."""
    waiting = [f"{name} waits: {why}" for name, why in sorted(done.waiting.items())]
    return [*done.set_aside, *done.problems, *waiting]


def main() -> int:
    """Restore for a command that found a new data plane (graft/state/restored.py)."""
    try:
        done = bring_up(Settings.from_environment(), only_if_new=True)
    except GraftError as error:
        print(printable(f"graft: not restored: {error.message}"), file=sys.stderr)
        return error.exit_code
    for line in (*done.set_aside, *done.problems):
        print(printable(f"graft: {line}"), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
