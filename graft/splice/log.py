"""The daemon's log: lines on standard error, which is run_dir/graftd.log where a command started the daemon."""

from __future__ import annotations

import sys
import time

from graft.model.printable import printable


def log(text: str) -> None:
    """Write one line, with the time."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}", file=sys.stderr, flush=True)


class ContainerLog:
    """Lines about one container, which may cause them again and again: so many in a minute, the others are counted."""

    LINES, SECONDS = 10, 60.0

    def __init__(self) -> None:
        self._since, self._lines, self._left_out = 0.0, 0, 0

    def __call__(self, text: str) -> None:
        """Write one line, if not too many were written in this minute."""
        now = time.monotonic()
        if now >= self._since + self.SECONDS:
            left_out, self._since, self._lines, self._left_out = self._left_out, now, 0, 0
            if left_out:
                text = f"{text} ({left_out} lines about this container were left out before)"
        self._lines += 1
        if self._lines <= self.LINES:
            log(text)
        else:
            self._left_out += 1
