"""The folders that the watcher watches (watcher.py), and what changes in them matter.

The kernel reports changes (inotify(7)) as long as root may have another watch. Its limits are those of a user id, and
each process of that id takes from them: uid 0 of a container that has no user namespace of its own too. A folder that
the kernel does not watch is looked at instead, every few seconds.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from graft.kernel import inotify
from graft.saved.model import SavedAttachment, SavedState
from graft.state import helper_process
from graft.state.engines import CGROUP_WITH_ID, WITH_IDS
from graft.state.left_children import LeftChildren

ENGINE_FOLDERS = ("docker", "system.slice", "machine.slice", "libpod_parent")
"""Where docker and podman make cgroups, with either cgroup driver, if they are not told otherwise."""

POD_NAME = re.compile(r"[0-9a-f]{64}|.*libpod_pod_[0-9a-f]{64}\.slice", re.ASCII)
"""The name of a pod's cgroup, with either driver: podman makes the pod's containers in it."""

HELD = "somebody holds a directory of the cgroup tree: no container that appears is seen"
_FOLDER_SECONDS = 2.0
_TRIES = 8

Names = frozenset[tuple[str, int]]
"""The names in a folder that matter, with the inodes: what is made anew has another one."""


@dataclass(frozen=True, slots=True)
class Interest:
    """What of a folder's changes matters: these names, and (``containers``) those with a container's id in them."""

    names: frozenset[str] = frozenset()
    containers: bool = False
    everything: bool = False

    def matches(self, name: str) -> bool:
        """Whether a change of ``name`` matters."""
        return self.everything or name in self.names or (self.containers and bool(CGROUP_WITH_ID.search(name)))

    def __or__(self, other: Interest) -> Interest:
        return Interest(
            self.names | other.names, self.containers or other.containers, self.everything or other.everything
        )


def paths_of(saved: SavedAttachment) -> tuple[str, ...]:
    """Below the v2 mount: where a container's cgroup was, or will be."""
    if saved.target.kind == "cgroup":
        return (saved.target.name,)
    paths = [saved.last.cgroup] if saved.last.cgroup else []
    if saved.target.kind == "unit":
        paths.append(f"system.slice/{saved.target.name}")
    return tuple(paths)


def nearest(top: Path, path: str) -> tuple[Path, str]:
    """The deepest folder above ``path`` that exists, and the next name on the way."""
    folder, parts = top, path.split("/")
    for index, part in enumerate(parts):
        if index == len(parts) - 1 or not os.path.isdir(folder / part):
            return folder, part
        folder /= part
    return folder, parts[-1]


def interests(top: Path, state: SavedState) -> dict[Path, Interest]:
    """The folders to watch for what is saved. Looks at the tree: in a child, because somebody may hold a folder."""
    found: dict[Path, Interest] = {}

    def add(folder: Path, interest: Interest) -> None:
        found[folder] = found.get(folder, Interest()) | interest

    for one in state.attachments:
        for path in paths_of(one):
            folder, name = nearest(top, path)
            add(folder, Interest(frozenset({name})))
        if one.target.kind in WITH_IDS:
            add(top, Interest(frozenset(ENGINE_FOLDERS)))
            for folder in _parents(top, one):
                if folder != top and os.path.isdir(folder):
                    add(folder, Interest(containers=True))
    return found


def _parents(top: Path, saved: SavedAttachment) -> set[Path]:
    """Where a container of an engine may be made: where its engine makes them, where it was last, and in pods there."""
    last = (top / saved.last.cgroup).parent
    found = {top / name for name in ENGINE_FOLDERS} | {last}
    if saved.target.kind == "podman":
        if POD_NAME.fullmatch(last.name):
            found.add(last.parent)
        found |= {folder / name for folder in found for name in _names(folder) if POD_NAME.fullmatch(name)}
    return found


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


@dataclass(frozen=True, slots=True)
class Unseen:
    """A folder that the kernel does not watch: why, and what was in it."""

    why: str
    names: Names


@dataclass(frozen=True, slots=True)
class _Look:
    """What a child has found: the watches that there are now, the other folders, and whether one was made meanwhile."""

    watches: dict[int, Interest]
    unseen: dict[str, Unseen]
    again: bool


class WatchedFolders:
    """The folders of what is saved, below ``top``, and ``own``, which are always there."""

    def __init__(self, top: Path, own: Mapping[Path, Interest]) -> None:
        self._top, self._own = top, own
        self._watches: dict[int, Interest] = {}
        self._unseen: dict[str, Unseen] = {}
        self._left = LeftChildren()
        self.fd: int | None = None
        """What becomes readable by a change; None where the kernel gives none."""
        self.problems: dict[str, str] = {}
        """Folders that the kernel does not watch, each with the reason."""
        self.is_held = False

    def watch(self, state: SavedState) -> bool:
        """Watch what is saved. Whether there may be something new in a folder that is not watched. Raises OSError."""
        before = self._unseen
        why_none = self._open()
        for _ in range(_TRIES):  # until nothing was made meanwhile on the way to a cgroup
            look = self._look_apart(state, why_none)
            self.is_held = look is None
            if look is None:
                break
            self._watches, self._unseen = look.watches, look.unseen
            if not look.again:
                break
        self.problems = {folder: one.why for folder, one in sorted(self._unseen.items())}
        return self._unseen != before

    def _open(self) -> str:
        """Why there is no inotify instance; empty where there is one."""
        if self.fd is None:
            try:
                self.fd = inotify.open_inotify()
            except OSError as error:
                return _reason(error)
        return ""

    def _look_apart(self, state: SavedState, why_none: str) -> _Look | None:
        """What a child finds. None: it waits for a folder that somebody holds, or an earlier one still does."""
        top = str(self._top)
        if self._left.has_one(top):
            return None
        keep = () if self.fd is None else (self.fd,)
        asked = helper_process.run_each(lambda _: self._look(state, why_none), (None,), _FOLDER_SECONDS, keep=keep)
        if asked.helper_pid:  # else it was slow, or somebody let go: the next try may succeed
            self._left.note([top], asked.results, asked.helper_pid)
        return asked.results.get(0)

    def _look(self, state: SavedState, why_none: str) -> _Look:
        """In a child, which shares the descriptor, because somebody may hold a folder."""
        wanted = interests(self._top, state)
        look = _Look({}, {}, False)
        for folder, interest in (*wanted.items(), *self._own.items()):
            why = why_none
            if self.fd is not None:
                try:
                    look.watches[inotify.watch_folder(self.fd, str(folder))] = interest
                    continue
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as error:
                    why = _reason(error)
            look.unseen[str(folder)] = Unseen(why, names_in(folder, interest))
        return _Look(look.watches, look.unseen, interests(self._top, state) != wanted)

    def have_changed(self) -> bool:
        """Read what the kernel reports; whether any of it matters."""
        matters = False
        for event in inotify.read_events(self.fd) if self.fd is not None else ():
            interest = self._watches.get(event.watch)
            if event.mask & (inotify.OVERFLOW | inotify.IGNORED | inotify.DELETE_SELF):
                matters = True
            elif interest is not None and not event.name.startswith("."):
                matters |= interest.matches(event.name)
        return matters


def names_in(folder: Path, interest: Interest) -> Names:
    """What is in a folder and matters; nothing where it cannot be listed."""
    found: Collection[tuple[str, int]] = ()
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        found = [
            (one.name, one.inode()) for one in entries if not one.name.startswith(".") and interest.matches(one.name)
        ]
    return frozenset(found)


def _reason(error: OSError) -> str:
    """As `watch_folder` and `open_inotify` say it: with the name of the system call."""
    return error.strerror or str(error)
