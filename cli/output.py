"""How commands speak: tables and colour to a terminal, plain text to a pipe, JSON when asked.

Whatever is shown goes through here, because part of it was chosen by a container (graft/model/printable.py).
JSON escapes on its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TextIO, TypeVar

from graft.errors import GraftError
from graft.model.printable import printable

P = ParamSpec("P")
R = TypeVar("R")


def say(*lines: str) -> None:
    """Print each of ``lines`` as one line."""
    for line in lines:
        print(_encodable(printable(line), sys.stdout), flush=True)


def warn(*lines: str) -> None:
    """The same for what is no result: to standard error."""
    for line in lines:
        print(_encodable(printable(line), sys.stderr), file=sys.stderr)


def _encodable(text: str, stream: TextIO) -> str:
    """``text`` as a terminal of another character set than UTF-8 can show it."""
    encoding = stream.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def fail(error: GraftError) -> NoReturn:
    """The error's lines, with their hints, and its exit code."""
    warn(*error.lines())
    raise SystemExit(error.exit_code)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Errors as lines instead of tracebacks; GRAFT_DEBUG=1 shows the traceback."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except GraftError as error:
            if os.environ.get("GRAFT_DEBUG"):
                raise
            fail(error)
        except PermissionError:
            if os.environ.get("GRAFT_DEBUG") or os.geteuid() == 0:
                raise
            fail(GraftError("this needs root", "run it with sudo"))

    return guarded


def listing(
    title: Sequence[str], rows: Sequence[Sequence[Any]], records: Sequence[dict[str, Any]], as_json: bool
) -> None:
    """``records`` as JSON, or ``rows`` under ``title``: a table on a terminal, tab-separated in a pipe."""
    if as_json:
        print(json.dumps(list(records), indent=2))
        return
    if not sys.stdout.isatty():
        for row in rows:
            print(_encodable("\t".join(printable(str(cell)) for cell in row), sys.stdout))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for column in title:
        table.add_column(column)
    for row in rows:
        # As Text: in a plain string rich takes [fe80::1] and the like for the name of a colour.
        table.add_row(*(Text(_encodable(printable(str(cell)), sys.stdout)) for cell in row))
    Console().print(table)
