"""The watcher: attaches saved containers when they appear. It runs while there is anything saved to watch for.

    a cgroup is made or removed ── inotify ──> a name that a saved container may have? ──> restore (restore.py)

`graft up` and `graft attach` start it. It sleeps until the kernel reports a change in one of the folders where saved
containers are, or will be, or in what is saved. A container is made in steps: its cgroup, its processes, their network
namespace, and last the engine's own note that it runs. So after a change it tries several times, at growing distances.

It attaches in its own process, which has everything loaded: until a container that starts is under its policy it takes
the time of some short children (graft/state/helper_process.py), and of the engine, where that has to be asked.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from graft.commands.restore import CONTAINER_NAME, ENGINE_FOLDERS, Restored, restore
from graft.commands.watcher_process import watcher_lock
from graft.errors import ConflictError, GraftError
from graft.kernel import cgroup, inotify
from graft.kernel.credentials import require_root
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.saved.model import SavedAttachment, SavedState
from graft.saved.store import ATTACHMENTS, ENDPOINTS, Store
from graft.state import helper_process
from graft.state.installation import Installation

TRIES = (0.0, 0.02, 0.1, 0.3, 0.8, 2.0, 4.0, 8.0)
"""Seconds after a change at which it is tried to attach what waits."""

SETTLED_SECONDS = 3.5
"""After that a container's processes are in the namespace that they stay in."""

_RETRY_SECONDS = 30.0
_IDLE_SECONDS = 3.0
_FOLDER_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Interest:
    """What of a folder's changes matters: these names, and (``containers``) those with a container's id in them."""

    names: frozenset[str] = frozenset()
    containers: bool = False
    everything: bool = False

    def matches(self, name: str) -> bool:
        """Whether a change of ``name`` matters."""
        return self.everything or name in self.names or (self.containers and bool(CONTAINER_NAME.search(name)))

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
        if index == len(parts) - 1 or not (folder / part).is_dir():
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
        if one.target.kind in ("docker", "podman"):
            add(top, Interest(frozenset(ENGINE_FOLDERS)))
            parents = {top / name for name in ENGINE_FOLDERS} | {(top / one.last.cgroup).parent}
            for folder in parents:
                if folder != top and folder.is_dir():
                    add(folder, Interest(containers=True))
    return found


@dataclass(slots=True)
class _Schedule:
    """When to try next. ``changed``: when something was seen last."""

    changed: float = field(default_factory=time.monotonic)
    due: list[float] = field(default_factory=list)

    def start(self) -> None:
        self.changed = time.monotonic()
        self.due = [self.changed + delay for delay in TRIES]

    def later(self) -> None:
        self.due = self.due or [time.monotonic() + _RETRY_SECONDS]

    def stop(self) -> None:
        self.due = []

    def take_due(self) -> bool:
        now = time.monotonic()
        is_due = any(one <= now for one in self.due)
        self.due = [one for one in self.due if one > now]
        return is_due

    @property
    def settled(self) -> bool:
        return time.monotonic() - self.changed > SETTLED_SECONDS

    @property
    def timeout(self) -> float | None:
        return max(0.0, min(self.due) - time.monotonic()) if self.due else None


class Watcher:
    """Watches for one installation, until nothing is saved."""

    def __init__(self, settings: Settings, keep: bool) -> None:
        self._settings, self._keep = settings, keep
        self._store = Store(settings)
        self._top = cgroup.v2_mount()
        self._inotify = inotify.open_inotify()
        self._watched: dict[int, tuple[str, Interest]] = {}
        self._schedule = _Schedule()
        self._said: frozenset[str] = frozenset()

    def run(self) -> None:
        """Watch until a signal ends the process, or (without ``keep``) nothing is saved any more."""
        self._watch()
        self._schedule.start()
        while True:
            if self._schedule.take_due():
                self._try()
            elif self._is_done():
                return
            ready, _, _ = select.select([self._inotify], [], [], self._timeout())
            if ready and self._changed():
                self._schedule.start()  # first it is tried; what has to be watched now is looked up after that

    def _timeout(self) -> float | None:
        nothing = not self._keep and not self._watched_state().attachments
        return _IDLE_SECONDS if nothing and self._schedule.timeout is None else self._schedule.timeout

    def _watched_state(self) -> SavedState:
        try:
            return self._store.read()[0] if self._store.exists else SavedState()
        except (GraftError, OSError) as error:
            self._say([str(error)])
            return SavedState()

    def _is_done(self) -> bool:
        return not self._keep and not self._schedule.due and not self._watched_state().attachments

    def _try(self) -> None:
        try:
            with Installation(self._settings) as graft:
                done = restore(graft, self._schedule.settled)
        except (GraftError, OSError) as error:
            self._say([str(error)])
            self._schedule.later()
            return
        self._report(done)
        if not done.waiting and not done.problems:
            self._schedule.stop()
        elif done.may_succeed_later:
            self._schedule.later()
        self._watch()

    def _report(self, done: Restored) -> None:
        for line in (*done.set_aside, *(f"attached {name}" for name in done.attached)):
            _log(line)
        self._say([*done.problems, *(f"{name} waits: {why}" for name, why in done.waiting.items())])

    def _say(self, lines: list[str]) -> None:
        """Log those that were not logged the last time too."""
        for line in lines:
            if line not in self._said:
                _log(line)
        self._said = frozenset(lines)

    # ---- what is watched ------------------------------------------------------------------------

    def _watch(self) -> None:
        """Watch the folders of what is saved. Again until nothing was made meanwhile on the way to a cgroup."""
        state = self._watched_state()
        for _ in range(8):
            found = helper_process.run_each(
                lambda _: self._add_watches(state), (None,), _FOLDER_SECONDS, keep={self._inotify}
            ).results.get(0)
            if found is None:
                self._say(["somebody holds a directory of the cgroup tree: no container that appears is seen"])
                self._schedule.later()
                return
            wanted, again = found
            self._watched = wanted
            if not again:
                return

    def _add_watches(self, state: SavedState) -> tuple[dict[int, tuple[str, Interest]], bool]:
        """In a child, which shares the descriptor: the watches, and whether a folder was made since it looked."""
        wanted = interests(self._top, state)
        watches: dict[int, tuple[str, Interest]] = {}
        for folder, interest in (*wanted.items(), *self._own_folders()):
            with contextlib.suppress(OSError):
                watches[inotify.watch_folder(self._inotify, str(folder))] = (str(folder), interest)
        return watches, interests(self._top, state) != wanted

    def _own_folders(self) -> Iterator[tuple[Path, Interest]]:
        yield self._store.folder / ATTACHMENTS, Interest(everything=True)
        yield self._store.folder / ENDPOINTS, Interest(everything=True)
        yield self._store.folder.parent, Interest(frozenset({self._store.folder.name}))

    def _changed(self) -> bool:
        """Read what has changed; whether any of it matters."""
        matters = False
        for event in inotify.read_events(self._inotify):
            watch = self._watched.get(event.watch)
            if event.mask & (inotify.OVERFLOW | inotify.IGNORED | inotify.DELETE_SELF):
                matters = True
            elif watch is not None and not event.name.startswith("."):
                matters |= watch[1].matches(event.name)
        return matters


def _log(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), printable(line), file=sys.stderr, flush=True)


def run(settings: Settings, keep: bool = True) -> None:
    """Run the watcher in the foreground. Raises ConflictError where one runs already."""
    require_root()
    settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with watcher_lock(settings):
        folder = cgroup.v2_mount() / settings.cgroup / "watcher"
        cgroup.make(folder)
        cgroup.enter(folder)
        watcher = Watcher(settings, keep)
        gc.freeze()
        watcher.run()


def main() -> None:
    """The watcher in the background: a child that nobody has to wait for (watcher_process.py)."""
    if os.fork():
        os._exit(0)
    try:
        run(Settings.from_environment(), keep=False)
    except ConflictError:
        pass  # another command started one first
    except GraftError as error:
        _log(error.message)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
