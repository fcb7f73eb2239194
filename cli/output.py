"""Output of the commands: tables on a terminal, tab-separated text in a pipe, JSON with --json.

All output goes through this module, because containers choose parts of it: control characters are escaped
(graft/model/printable.py). JSON escapes them by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, ParamSpec, TextIO, TypeVar

import typer

from graft.errors import GraftError, KernelError
from graft.model.printable import printable

if TYPE_CHECKING:
    from rich.table import Table

P = ParamSpec("P")
R = TypeVar("R")


def say(*lines: str, colour: str | None = None) -> None:
    """Print each of ``lines`` as one line; in ``colour`` (a name of click's) on a terminal."""
    for line in lines:
        text = _encodable(printable(line), sys.stdout)
        if colour is not None and sys.stdout.isatty():
            text = typer.style(text, fg=colour)
        print(text, flush=True)


def warn(*lines: str) -> None:
    """Print each of ``lines`` as one line on standard error: warnings, errors, and what is not the result."""
    for line in lines:
        print(_encodable(printable(line), sys.stderr), file=sys.stderr)


def _encodable(text: str, stream: TextIO) -> str:
    """``text`` with escapes for characters that the stream's encoding does not have."""
    encoding = stream.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def fail(error: GraftError) -> NoReturn:
    """Print the error with its hint, and exit with its code."""
    warn(*error.lines())
    raise SystemExit(error.exit_code)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a command: prints an error as one line. GRAFT_DEBUG=1 shows the traceback instead."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except GraftError as error:
            if os.environ.get("GRAFT_DEBUG"):
                raise
            fail(error)
        except BrokenPipeError:
            raise  # click ends then, silently
        except OSError as error:
            if os.environ.get("GRAFT_DEBUG"):
                raise
            if isinstance(error, PermissionError) and os.geteuid() != 0:
                fail(GraftError("this needs root", "run it with sudo"))
            fail(KernelError(str(error), "GRAFT_DEBUG=1 shows where"))

    return guarded


def listing(
    title: Sequence[str], rows: Sequence[Sequence[Any]], records: Sequence[dict[str, Any]], as_json: bool
) -> None:
    """Print ``records`` as JSON, or ``rows``: in a table with ``title`` on a terminal, tab-separated in a pipe."""
    if as_json:
        print(json.dumps(list(records), indent=2))
        return
    if not sys.stdout.isatty():
        _print_rows(rows)
        return
    from rich.console import Console

    Console().print(_table(title, rows))


class Frame(NamedTuple):
    """What `refreshing` shows at a time: a line, the rows of a table, and lines below it for a terminal only."""

    line: str
    rows: Sequence[Sequence[Any]]
    below: Sequence[str] = ()


def refreshing(title: Sequence[str], frames: Iterable[Frame]) -> None:
    """Print each of ``frames``: in the place of the one before on a terminal, one after the other in a pipe.

    Ends with the frames, or when the user interrupts it.
    """
    with contextlib.suppress(KeyboardInterrupt):
        if not sys.stdout.isatty():
            for frame in frames:
                say(frame.line)
                _print_rows(frame.rows)
                sys.stdout.flush()
            return
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False) as live:
            for frame in frames:
                line, *below = (Text(_encodable(printable(one), sys.stdout)) for one in (frame.line, *frame.below))
                live.update(Group(line, _table(title, frame.rows), *below), refresh=True)


def _print_rows(rows: Sequence[Sequence[Any]]) -> None:
    for row in rows:
        print(_encodable("\t".join(printable(str(cell)) for cell in row), sys.stdout))


def _table(title: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for column in title:
        table.add_column(column)
    for row in rows:
        # As Text: rich would read [fe80::1] in a plain string as markup.
        table.add_row(*(Text(_encodable(printable(str(cell)), sys.stdout)) for cell in row))
    return table


@contextlib.contextmanager
def progress(total: float) -> Iterator[Callable[[float, int], object]]:
    """A bar on standard error, on a terminal: a function to call with what is done of ``total``, and a count."""
    if not sys.stderr.isatty():
        yield lambda done, count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[count]} seen"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, count=0)
        yield lambda done, count: bar.update(task, completed=done, count=count)
