"""Work that is too long for one turn in the loop: a generator, of which each turn makes one step."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator
from typing import TypeVar

from graft.errors import GraftError
from graft.splice.event_loop import EventLoop

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work that gives its result when it ends, and yields where others may have their turn."""


class Job:
    """``steps`` made in the turns of ``who``, from now on; then ``done`` is called with what went wrong, or None."""

    def __init__(
        self, loop: EventLoop, who: int, steps: Steps[None], done: Callable[[BaseException | None], None]
    ) -> None:
        self._loop, self._who, self._steps, self._done = loop, who, steps, done
        self._stopped = False
        self.spent = 0.0
        """Seconds that its steps have taken so far."""
        loop.later(self._step, who)

    def _step(self) -> None:
        if self._stopped:
            return
        start = time.monotonic()
        try:
            next(self._steps)
        except StopIteration:
            self._end(start, None)
        except (GraftError, OSError) as error:
            self._end(start, error)
        except Exception as error:
            traceback.print_exc()
            self._end(start, error)
        else:
            self.spent += time.monotonic() - start
            self._loop.later(self._step, self._who)

    def _end(self, start: float, error: BaseException | None) -> None:
        self.spent += time.monotonic() - start
        self._stopped = True
        self._done(error)

    def stop(self) -> None:
        """Make no further step, and do not call ``done``. Safe to repeat."""
        self._stopped = True
        self._steps.close()
