"""How commands speak: tables and colour to a terminal, plain text to a pipe, JSON when asked."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

from graft.errors import GraftError

P = ParamSpec("P")
R = TypeVar("R")


def fail(error: GraftError) -> NoReturn:
    """The error's lines, with their hints, and its exit code."""
    for line in error.lines():
        print(line, file=sys.stderr)
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
            print("\t".join(str(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in title:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
