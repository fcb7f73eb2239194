"""Graft's own keeper, as graftd sees it: when it is killed, graftd starts another one, and stores all with that."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from collections.abc import Callable
from functools import partial

from graft.keeper import protocol
from graft.model.settings import Settings
from graft.splice import daemon_process
from graft.splice.descriptor_store import connected
from graft.splice.event_loop import EventLoop
from graft.splice.kept import Kept
from graft.splice.log import warn

_AGAIN_SECONDS = 1.0


class KeeperWatch:
    """``pid``: its process id, 0 where there is none that has everything, or the service manager is it. ``keep``:
    graftd's own option.
    """

    def __init__(self, settings: Settings, loop: EventLoop, kept: Kept, pid: int, keep: bool) -> None:
        self._settings, self._loop, self._kept, self._keep = settings, loop, kept, keep
        self.on_another: Callable[[dict[str, str]], None] = lambda _told: None
        """Called with what another keeper would have told graftd in its environment."""
        self._started: subprocess.Popen[bytes] | None = None
        self._watched = self.pid = 0
        if pid and kept.store.is_kept:
            self._watch(pid)

    def _watch(self, pid: int, shown: bool = True) -> None:
        try:
            process = os.pidfd_open(pid)
        except OSError:  # it has died already
            self._loop.later(self._start)
            return
        self._watched, self.pid = pid, pid if shown else 0
        self._loop.watch(process, select.EPOLLIN, partial(self._on_death, process))

    def _on_death(self, process: int, _mask: int) -> None:
        self._loop.unwatch(process)
        os.close(process)
        warn(f"the keeper ({self._watched}) has died; another one is started")
        self._watched = self.pid = 0
        self._kept.store.disconnect()
        self._start()

    def _start(self) -> None:
        if self._started is not None:
            self._started.poll()  # it is no zombie any more
        try:
            self._started, reader = daemon_process.start_keeper(self._settings, self._keep, adopted=os.getpid())
        except OSError as error:
            warn(f"no keeper can be started: {error.strerror}")
            self._loop.after(_AGAIN_SECONDS, self._start)
            return
        self._loop.watch(reader, select.EPOLLIN | select.EPOLLHUP, partial(self._on_ready, reader, self._started.pid))

    def _on_ready(self, reader: int, pid: int, _mask: int) -> None:
        self._loop.unwatch(reader)
        is_ready = bool(os.read(reader, 16))
        os.close(reader)
        folder = os.open(self._settings.run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            told = {protocol.NOTIFY_SOCKET: protocol.address(folder)} if is_ready else {}
            sock = connected(told)
            if sock is None:
                self._loop.after(_AGAIN_SECONDS, self._start)
                return
            self._kept.store_all(sock)
            self.on_another(told)
        finally:
            os.close(folder)
        self._watch(pid, shown=False)
        self._kept.store.when_done(partial(self._show, pid))

    def _show(self, pid: int) -> None:
        """The keeper has everything."""
        if self._watched == pid:
            self.pid = pid

    def close(self) -> None:
        """graftd ends by itself, and its keeper with it."""
        with contextlib.suppress(OSError):
            self._kept.store.say({protocol.STOPPING: "1"})
            self._kept.store.flush(_AGAIN_SECONDS)
