"""Work that is too long for one turn of the event loop: a generator, run one step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from graft.errors import GraftError
from graft.splice.event_loop import EventLoop
from graft.splice.log import log_failure

T = TypeVar("T")
Stepwise = Generator[Any, None, T]
"""Work that returns its result when it ends, and yields wherever others may have their turn: None, or the number of
seconds after which it is to be continued.
"""


class Job:
    """Runs ``steps`` in the turns of ``owner``, from now on; then calls ``done`` with the error, or None."""

    def __init__(
        self, loop: EventLoop, owner: int, steps: Stepwise[None], done: Callable[[BaseException | None], None]
    ) -> None:
        self._loop, self._owner, self._steps, self._done = loop, owner, steps, done
        self._stopped = False
        self.spent = 0.0
        """How long its steps have taken so far, in seconds."""
        loop.later(self._step, owner)

    def _step(self) -> None:
        if self._stopped:
            return
        start = time.monotonic()
        try:
            pause = next(self._steps)
        except StopIteration:
            self._end(start, None)
        except (GraftError, OSError) as error:
            self._end(start, error)
        except Exception as error:
            log_failure()
            self._end(start, error)
        else:
            self.spent += time.monotonic() - start
            if pause:
                self._loop.after(pause, self._step, self._owner)
            else:
                self._loop.later(self._step, self._owner)

    def _end(self, start: float, error: BaseException | None) -> None:
        self.spent += time.monotonic() - start
        self._stopped = True
        self._done(error)

    def stop(self) -> None:
        """Run no further step, and do not call ``done``. Safe to repeat."""
        self._stopped = True
        self._steps.close()
