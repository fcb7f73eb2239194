"""The relay in the kernel, for the containers that are to have it: its maps, once the self-test has passed.

The test may take a minute, so it runs aside. Until it has passed, and where it fails, splice(2) serves.
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
    """``changed`` is called when `sockmap` may have another answer than before."""

    def __init__(self, settings: Settings, loop: EventLoop, aside: Background, changed: Callable[[], None]) -> None:
        self._settings, self._loop, self._aside, self._changed = settings, loop, aside, changed
        self._sockmap: Sockmap | None = None
        self._verdict: SelftestResult | None = None
        self._testing = False
        self._started: list[subprocess.Popen[str]] = []

    @property
    def problem(self) -> str:
        """Why there is none: empty also while that is not known yet."""
        return "" if self._verdict is None else self._verdict.problem

    def sockmap(self) -> Sockmap | None:
        """The relay; None where splice(2) has to serve, perhaps only until the test has ended, which then runs."""
        if self._sockmap is None and not self._testing:
            self._verdict = self._verdict or selftest_result.kept(self._settings)
            if self._verdict is None:
                self._testing = True
                self._aside.run(partial(selftest_result.test, self._started.append), self._tested)
            elif not self._verdict.problem:
                self._open()
        return self._sockmap

    def _open(self) -> None:
        try:
            self._sockmap = Sockmap.pinned(self._settings.pin_dir)
        except OSError as error:
            self._verdict = SelftestResult(f"it was not loaded when Graft came up ({error.strerror})")
            return
        self._loop.watch(self._sockmap.events, select.EPOLLIN, self._sockmap.on_events)

    def _tested(self, found: SelftestResult | None, error: Exception | None) -> None:
        self._testing = False
        self._started.clear()
        self._verdict = found or SelftestResult(f"its self-test cannot run: {error}", lasting=False)
        if not self._verdict.lasting:
            self._loop.after(_RETRY_SECONDS, self._forget)
        with contextlib.suppress(OSError):
            selftest_result.keep(self._settings, self._verdict)
        self._changed()

    def _forget(self) -> None:
        self._verdict = None
        self._changed()

    def close(self) -> None:
        """Let go of the maps, and end a test that runs."""
        for process in self._started:
            process.kill()
        if self._sockmap is not None:
            self._sockmap.close()
