"""Containers that a command is just attaching or removing, or was when it was killed: nothing of them is left for ever.

    run_dir/begun/ID.json    the record of such a container, from before anything of it is in the maps
    run_dir/undone           is made anew when one was undone: it may be saved, and run without its policy from then on

When all hooks are attached it goes to its place among the others (records.py), in one step, and comes back before the
first hook is detached: so a record among the others is of a container that has its hooks. What the next command finds
here, under the lock, is of one that was killed, and is undone (`Installation.reap`). Only this tells of such a one: a
container in the maps that has no record may have lost that in another way (the folder was removed, GRAFT_RUN_DIR is
another one now), and stays confined.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from graft.kernel.atomic_file import write_atomically
from graft.model.settings import Settings
from graft.state import records
from graft.state.records import Container

UNDONE = "undone"


def note(settings: Settings, container: Container) -> None:
    """Write its record here. Raises OSError, and UsageError if it could not be read again: then nothing is left."""
    raw = records.encode_checked(container)
    for file in (records.file_of(settings, container.id), _file(settings, container.id)):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(_file(settings, container.id), raw)


def finish(settings: Settings, number: int) -> None:
    """It is attached: put its record in its place."""
    _file(settings, number).rename(records.file_of(settings, number))


def take_back(settings: Settings, number: int) -> None:
    """It is removed from here on: take its record out of its place, back to here. Safe to repeat."""
    with contextlib.suppress(OSError):  # it is here, or there is no room for the folder: it is removed all the same
        _folder(settings).mkdir(mode=0o700, parents=True, exist_ok=True)
        records.file_of(settings, number).rename(_file(settings, number))


def forget(settings: Settings, number: int) -> None:
    """It is undone. Safe to repeat."""
    _file(settings, number).unlink(missing_ok=True)


def tell_undone(settings: Settings) -> None:
    """Tell the watcher, which looks for this name (graft/commands/watcher.py)."""
    with contextlib.suppress(OSError):  # no room: it is attached when something else is told
        write_atomically(settings.run_dir / UNDONE, b"")


def exists(settings: Settings, number: int) -> bool:
    """Whether it is neither finished nor undone."""
    return _file(settings, number).exists()


def listing(settings: Settings) -> list[Container]:
    """All of them. Without the lock, some may be finished next."""
    return [container for _, container in records.readable(_folder(settings))]


def _folder(settings: Settings) -> Path:
    return settings.run_dir / "begun"


def _file(settings: Settings, number: int) -> Path:
    return _folder(settings) / f"{number}.json"
