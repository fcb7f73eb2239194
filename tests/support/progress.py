"""How far something long is, on standard error."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line that is written over on a terminal, and lines now and then on a pipe."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = 0.0

    def show(self, text: str) -> None:
        """How far it is."""
        if time.monotonic() - self._last < (0.2 if self._terminal else 30):
            return
        self._last = time.monotonic()
        print(
            f"\r\033[K{text}" if self._terminal else text,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        """A fresh line."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
