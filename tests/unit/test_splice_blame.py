"""Whoever makes a call slow that wakes others is to wait for it: each such call is timed, and somebody is blamed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from graft.splice import connection, kernel_flow

WAKING = {
    "splice",
    "peek",
    "recv",
    "recv_into",
    "send",
    "shutdown",
    "_shut_target",
    "enlarge_receive_buffer",
    "reprocess_received",
}
"""What sends to a socket's peer, or takes out of its queue, which tells the peer that there is room."""
TIMED_BY_CALLER = {"_shut_target"}


def called(call: ast.Call) -> str:
    """The last word of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def untimed(function: ast.FunctionDef) -> list[str]:
    """Its calls that wake others and stand between no start of a time and the `blame` that follows."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    found, is_timed = [], False
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        name = called(call)
        if name == "monotonic":
            is_timed = True
        elif name == "blame":
            is_timed = False
        elif name in WAKING and not is_timed:
            found.append(f"{function.name}, line {call.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", [connection.__file__, kernel_flow.__file__])
def test_every_call_that_wakes_others_is_blamed_on_somebody(path: str) -> None:
    functions = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.FunctionDef)]
    assert [one for function in functions if function.name not in TIMED_BY_CALLER for one in untimed(function)] == []
