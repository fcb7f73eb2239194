"""The relay in the kernel, for the containers that are to have it: its maps, once the self-test has passed.

The test may take a minute, so it runs in the background. Until it has passed, and where it fails, splice(2) is used.
"""

from __future__ import annotations

import contextlib
import select
import subprocess
from collections.abc import Callable
from functools import partial

from graft.model.settings import Settings
from graft.splice import selftest_result
from graft.splice.background import Background
from graft.splice.event_loop import EventLoop
from graft.splice.selftest_result import SelftestResult
from graft.splice.sockmap import Sockmap

_RETRY_SECONDS = 60.0


class KernelRelay:
    """Calls ``changed`` when `sockmap` may return something else than before."""

    def __init__(
        self, settings: Settings, loop: EventLoop, background: Background, changed: Callable[[], None]
    ) -> None:
        self._settings, self._loop, self._background, self._changed = settings, loop, background, changed
        self._sockmap: Sockmap | None = None
        self._result: SelftestResult | None = None
        self._testing = False
        self._started: list[subprocess.Popen[str]] = []

    @property
    def problem(self) -> str:
        """Why there is none; empty also while the test runs."""
        return "" if self._result is None else self._result.problem

    def sockmap(self) -> Sockmap | None:
        """The relay; None to use splice(2). Where there is no result yet, this starts the self-test."""
        if self._sockmap is None and not self._testing:
            self._result = self._result or selftest_result.stored(self._settings)
            if self._result is None:
                self._testing = True
                self._background.run(partial(selftest_result.run_selftest, self._started.append), self._on_result)
            elif not self._result.problem:
                self._open()
        return self._sockmap

    def _open(self) -> None:
        try:
            self._sockmap = Sockmap.pinned(self._settings.pin_dir)
        except OSError as error:
            self._result = SelftestResult(f"it was not loaded by graft up ({error.strerror})")
            return
        self._loop.watch(self._sockmap.events, select.EPOLLIN, self._sockmap.on_events)

    def _on_result(self, found: SelftestResult | None, error: Exception | None) -> None:
        self._testing = False
        self._started.clear()
        self._result = found or SelftestResult(f"its self-test cannot run: {error}", conclusive=False)
        if not self._result.conclusive:
            self._loop.after(_RETRY_SECONDS, self._discard_result)
        with contextlib.suppress(OSError):
            selftest_result.store(self._settings, self._result)
        self._changed()

    def _discard_result(self) -> None:
        self._result = None
        self._changed()

    def close(self) -> None:
        """Close the maps, and end a running test."""
        for process in self._started:
            process.kill()
        if self._sockmap is not None:
            self._sockmap.close()
