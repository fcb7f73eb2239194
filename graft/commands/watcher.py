"""The watcher: attaches saved containers when they appear. It runs while there is anything saved to watch for.

    a cgroup is made or removed ── inotify ──> a name that a saved container may have? ──> restore (restore.py)

`graft up` and `graft attach` start it. It sleeps until the kernel reports a change in one of the folders where saved
containers are, or will be, in what is saved, or in what was undone of a killed command (graft/state/begun.py). A
container is made in steps: its cgroup, its processes, their network namespace, and last the engine's own note that it
runs. So after a change it tries several times, at growing distances. Folders that the kernel does not watch
(watched_folders.py) it looks at every few seconds.

It attaches in its own process, which has everything loaded: until a container that starts is under its policy it takes
the time of some short children (graft/state/helper_process.py), and of the engine, where that has to be asked. So it
lives long, and every user can hold its folder in /proc meanwhile: what it looks up there is kept in the kernel's cache.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from graft.commands.restore import Restored, restore
from graft.commands.sightings import Sightings
from graft.commands.watched_folders import HELD, Interest, WatchedFolders
from graft.commands.watcher_process import note_problems, watcher_lock
from graft.datapath import dataplane
from graft.errors import ConflictError, GraftError
from graft.keeper.lines import write_line
from graft.kernel import cgroup, journal, unix_files
from graft.kernel.credentials import require_root
from graft.kernel.journal import Priority
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.saved.model import SavedState
from graft.saved.store import ATTACHMENTS, ENDPOINTS, Store
from graft.state import begun
from graft.state.installation import Installation

TRIES = (0.0, 0.02, 0.1, 0.3, 0.8, 2.0, 4.0, 8.0)
"""Seconds after a change at which it is tried to attach what waits."""

_APART, _MOST_APART = 1 / 8, 0.25
"""A try is left out where another one is as near as this part of its distance from the change, but at most so many
seconds. So a few dozens are due at a time, however many changes there are.
"""

_RETRY_SECONDS = 30.0
_IDLE_SECONDS = 3.0
LOOK_SECONDS = 3.0
"""How often a folder is looked at that the kernel does not watch."""


@dataclass(slots=True)
class Schedule:
    """When to try next."""

    due: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Something has changed. The tries after earlier changes stay: whoever makes changes all the time keeps nobody
        else's container from those that come late.
        """
        now = time.monotonic()
        for delay in TRIES:
            apart = min(delay * _APART, _MOST_APART)
            if not any(abs(now + delay - one) <= apart for one in self.due):
                self.due.append(now + delay)

    def later(self) -> None:
        """Something may succeed without a change."""
        self.due = self.due or [time.monotonic() + _RETRY_SECONDS]

    def stop(self) -> None:
        """Nothing is left to try."""
        self.due = []

    def take_due(self) -> bool:
        """Whether it is to be tried now."""
        now = time.monotonic()
        is_due = any(one <= now for one in self.due)
        self.due = [one for one in self.due if one > now]
        return is_due

    @property
    def timeout(self) -> float | None:
        """Seconds until the next try; None: there is none."""
        return max(0.0, min(self.due) - time.monotonic()) if self.due else None


class Watcher:
    """Watches for one installation, until nothing is saved."""

    def __init__(
        self,
        settings: Settings,
        keep: bool,
        note_work: Callable[[bool], None] = lambda is_busy: None,
        log: Log | None = None,
    ) -> None:
        """``note_work`` is called when it begins to work, and when it goes to sleep."""
        self._settings, self._keep, self._note_work = settings, keep, note_work
        self._log = log or Log()
        self._store = Store(settings)
        everything = Interest(everything=True)
        self._folders = WatchedFolders(
            cgroup.v2_mount(),
            {
                self._store.folder / ATTACHMENTS: everything,
                self._store.folder / ENDPOINTS: everything,
                self._store.folder.parent: Interest(frozenset({self._store.folder.name})),
                settings.run_dir: Interest(frozenset({begun.UNDONE})),
            },
        )
        self._looked = 0.0
        self._is_blind = False
        self._schedule = Schedule()
        self._sightings = Sightings()
        self._said: dict[str, frozenset[str]] = {}
        self._noted: list[str] | None = None

    def run(self) -> None:
        """Watch until a signal ends the process, or (without ``keep``) nothing is saved any more. Raises ConflictError
        where the data plane is another version's.
        """
        self._watch()
        self._schedule.start()
        while True:
            if self._schedule.take_due():
                self._try()
            elif self._is_done():
                return
            fds = [] if self._folders.fd is None else [self._folders.fd]
            timeout = self._timeout()
            self._note_work(False)
            ready, _, _ = select.select(fds, [], [], timeout)
            self._note_work(True)
            if ready and self._has_changed():
                self._schedule.start()  # first it is tried; what has to be watched now is looked up after that
            elif self._is_blind and time.monotonic() >= self._looked + LOOK_SECONDS:
                self._watch()

    def _timeout(self) -> float | None:
        times = [] if self._schedule.timeout is None else [self._schedule.timeout]
        if self._is_blind:
            times.append(max(0.0, self._looked + LOOK_SECONDS - time.monotonic()))
        if not times and not self._keep and not self._watched_state().attachments:
            times.append(_IDLE_SECONDS)
        return min(times, default=None)

    def _watched_state(self) -> SavedState:
        try:
            return self._store.read()[0] if self._store.exists else SavedState()
        except (GraftError, OSError) as error:
            self._say("saved", [str(error)])
            return SavedState()

    def _is_done(self) -> bool:
        return not self._keep and not self._schedule.due and not self._watched_state().attachments

    def check_layout(self) -> None:
        """Raises ConflictError where the maps are another version's, for which that one's watcher is to run."""
        try:
            dataplane.is_up(self._settings)
        except ConflictError as error:
            self._log(str(error), Priority.ERROR)
            raise
        except (GraftError, OSError):  # who works with the maps says it
            pass

    def _try(self) -> None:
        self.check_layout()
        try:
            with Installation(self._settings) as graft:
                done = restore(graft, self._sightings)
        except Exception as error:  # whatever it is, it must not leave every container without its policy
            self._say("restored", [_text(error)])
            self._schedule.later()
            return
        self._report(done)
        if not done.waiting and not done.problems:
            self._schedule.stop()
        elif done.may_succeed_later:
            self._schedule.later()
        self._watch()

    def _report(self, done: Restored) -> None:
        for name in done.attached:
            self._log(f"attached {name}", container=name)
        self._say("restored", [*done.problems, *(f"{name} waits: {why}" for name, why in done.waiting.items())])

    def _say(self, about: str, lines: list[str]) -> None:
        """Log those that were not logged the last time too."""
        for line in lines:
            if line not in self._said.get(about, ()):
                self._log(line, Priority.WARNING)
        self._said[about] = frozenset(lines)

    # ---- what is watched ------------------------------------------------------------------------

    def _watch(self) -> None:
        """Watch the folders of what is saved, and look at those that cannot be watched."""
        folders, problems = self._folders, {}
        try:
            if folders.watch(self._watched_state()):
                self._schedule.start()
            problems = folders.problems
        except Exception as error:
            problems = {str(cgroup.v2_mount()): _text(error)}
        self._looked = time.monotonic()
        self._is_blind = bool(problems) and not folders.is_held  # then each look would leave a process behind
        lines = [f"{folder} is only looked at every {LOOK_SECONDS:.0f} s: {why}" for folder, why in problems.items()]
        if folders.is_held:
            lines.append(HELD)
            self._schedule.later()
        self._say("watched", lines)
        if lines != self._noted:
            note_problems(self._settings, lines)
            self._noted = lines

    def _has_changed(self) -> bool:
        try:
            return self._folders.have_changed()
        except OSError as error:
            self._say("read", [_text(error)])
            return True


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, GraftError | OSError) else f"{type(error).__name__}: {error}"


class Log:
    """Lines on standard error; entries where that is systemd's journal. To be made in the unit's cgroup."""

    def __init__(self) -> None:
        self._journal = journal.of_standard_error("graft-watch")

    def __call__(self, line: str, priority: Priority = Priority.INFO, container: str = "") -> None:
        """Write one line. ``container``: the name of the one that it is about."""
        fields = {"GRAFT_CONTAINER": container} if container else {}
        if self._journal is not None and self._journal.send(line, priority, fields):
            return
        write_line(printable(line))


def run(settings: Settings, keep: bool = True, ready: int | None = None) -> None:
    """Run the watcher in the foreground. Raises ConflictError where one runs already, or the data plane is another
    version's.

    ``ready`` is a descriptor that a byte is written to when it watches.
    """
    unix_files.pin_own_descriptors()  # before anybody else has seen this process
    require_root()
    settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with watcher_lock(settings) as lock:
        log = Log()
        folder = cgroup.v2_mount() / settings.cgroup / "watcher"
        cgroup.make(folder)
        cgroup.enter(folder)
        watcher = Watcher(settings, keep, lock.note, log)
        gc.freeze()
        watcher.check_layout()  # before anybody is told that it watches
        if ready is not None:
            os.write(ready, b"+")
            os.close(ready)
        watcher.run()


def main() -> None:
    """The watcher in the background: a child that nobody has to wait for (watcher_process.py)."""
    if os.fork():
        os._exit(0)
    try:
        run(Settings.from_environment(), keep=False, ready=int(sys.argv[1]))
    except ConflictError:
        pass  # another command started one first; or it has logged why
    except GraftError as error:
        Log()(error.message, Priority.ERROR)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
