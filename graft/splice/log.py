"""The daemon's log: lines on standard error, which is run_dir/graftd.log where a command started the daemon. Where it
is systemd's journal, they are entries with the container in a field of its own. What cannot be written is lost.
"""

from __future__ import annotations

import contextlib
import time
import traceback

from graft.keeper.lines import write_line
from graft.kernel import journal
from graft.kernel.journal import Journal, Priority
from graft.model.printable import printable
from graft.state.records import Container

_IDENTIFIER = "graftd"
_journal: Journal | None = None


def connect() -> None:
    """Write to the journal from here on, if standard error is its. To be called while in the unit's cgroup."""
    global _journal
    _journal = journal.of_standard_error(_IDENTIFIER)


def log(text: str, container: Container | None = None, priority: Priority = Priority.INFO) -> None:
    """Write one line, with the time. ``container``: the one that it is about, which is not in ``text``."""
    line = text if container is None else f"{container.name}: {text}"
    if not _to_journal(line, container, priority):
        write_line(printable(line))


def warn(text: str, container: Container | None = None) -> None:
    """`log` what is wrong."""
    log(text, container, Priority.WARNING)


def _to_journal(text: str, container: Container | None, priority: Priority) -> bool:
    if _journal is None:
        return False
    fields = {} if container is None else journal.container_fields(container.name, container.id)
    return _journal.send(text, priority, fields)


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
    """Problems of one container, which may cause them again and again."""

    def __init__(self, container: Container) -> None:
        super().__init__()
        self.container = container

    def __call__(self, text: str) -> None:
        """Write one line, if not too many were written in this minute."""
        left_out = self.next()
        if left_out is not None:
            more = f" ({left_out} lines about this container were left out before)" if left_out else ""
            warn(f"{text}{more}", self.container)


class FailureLog(_Limit):
    """Failures that nobody expects, which may come again and again too."""

    def __call__(self) -> None:
        """Write the traceback of the exception that is being handled, if not too many were written in this minute.

        Raises nothing: who calls this goes on after a failure, also of this.
        """
        with contextlib.suppress(Exception):
            self._write()

    def _write(self) -> None:
        left_out = self.next()
        if left_out is None:
            return
        if left_out:
            log(f"{left_out} failures were left out before", priority=Priority.ERROR)
        text = traceback.format_exc().rstrip()
        if not _to_journal(text, None, Priority.ERROR):
            write_line("\n".join(printable(line) for line in text.split("\n")))


log_failure = FailureLog()
