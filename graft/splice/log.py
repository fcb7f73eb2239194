"""The daemon's log: lines on standard error, which is run_dir/graftd.log where a command started the daemon."""

from __future__ import annotations

import sys
import time
import traceback

from graft.model.printable import printable


def log(text: str) -> None:
    """Write one line, with the time."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}", file=sys.stderr, flush=True)


class _Limit:
    """So many lines, or tracebacks, in a minute; the others are counted."""

    LINES, SECONDS = 10, 60.0

    def __init__(self) -> None:
        self._since, self._lines, self._left_out = 0.0, 0, 0

    def next(self) -> int | None:
        """How many were left out since the last time that the minute was over; None where this one is left out too."""
        left_out, now = 0, time.monotonic()
        if now >= self._since + self.SECONDS:
            left_out, self._since, self._lines, self._left_out = self._left_out, now, 0, 0
        self._lines += 1
        if self._lines <= self.LINES:
            return left_out
        self._left_out += 1
        return None


class ContainerLog(_Limit):
    """Lines about one container, which may cause them again and again."""

    def __call__(self, text: str) -> None:
        """Write one line, if not too many were written in this minute."""
        left_out = self.next()
        if left_out is not None:
            log(f"{text} ({left_out} lines about this container were left out before)" if left_out else text)


class FailureLog(_Limit):
    """Failures that nobody expects, which may come again and again too."""

    def __call__(self) -> None:
        """Write the traceback of the exception that is being handled, if not too many were written in this minute."""
        left_out = self.next()
        if left_out is None:
            return
        if left_out:
            log(f"{left_out} failures were left out before")
        traceback.print_exc()


log_failure = FailureLog()
