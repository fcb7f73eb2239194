"""The daemon's log: lines on standard error, which is run_dir/graftd.log where a command started the daemon."""

from __future__ import annotations

import sys
import time

from graft.model.printable import printable


def log(text: str) -> None:
    """Write one line, with the time."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}", file=sys.stderr, flush=True)
