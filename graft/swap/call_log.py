"""What `graft run -v` prints: a line for each trapped call."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from graft.model.endpoint import Endpoint
from graft.swap.decision import Action, Call
from graft.swap.supervisor import LogEntry


def format_entry(entry: LogEntry, endpoints: Mapping[int, Endpoint]) -> str:
    """``graft: bind 0.0.0.0:80 -> nx4 (0.0.0.0:8080)`` and the like."""
    if entry.text:
        return f"graft: {entry.text}"
    head = f"graft: {entry.call.name.lower()}" + (f" {entry.address}" if entry.address is not None else "")
    decision = entry.decision
    if decision.action is Action.REFUSE or entry.error:
        return f"{head}: {errno.errorcode.get(entry.error or decision.error, '?')}"
    if decision.action is Action.TO_HOST:
        endpoint = endpoints.get(decision.endpoint)
        name = endpoint.format() if endpoint else f"endpoint {decision.endpoint}"
        return f"{head} -> {name}" if entry.call is Call.BIND else f"{head} from {name}"
    if decision.action is Action.TO_CONTAINER:
        return f"{head}: back to the container"
    return f"{head}: unchanged"
