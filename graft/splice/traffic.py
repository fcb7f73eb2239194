"""What graftd has relayed, as it reports it: for `graft metrics` and `graft top`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graft.errors import UsageError
from graft.model import json_text
from graft.model.address import shown

_MOST = (1 << 64) - 1
_ANSWER = "the daemon's answer"


@dataclass(frozen=True, slots=True)
class Relayed:
    """What was relayed for one container since graftd serves it: "in" is to the container, "out" from it.

    ``connections`` are those of now, of UDP too: exchanges with granted destinations. Bytes are those of connections;
    what the relay in the kernel moves is counted some time later.
    """

    connections: int = 0
    connections_in: int = 0
    connections_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """``started``: when graftd was, in seconds since 1970; ``containers``: by the ids of those that it serves."""

    pid: int
    started: float
    containers: Mapping[int, Relayed]


def parse_traffic(answer: Mapping[str, Any]) -> Traffic:
    """What is in the daemon's answer. Raises UsageError."""
    started = answer.get("started")
    if not isinstance(started, (int, float)) or isinstance(started, bool):
        raise UsageError(f"{_ANSWER}: started: must be a number")
    containers = json_text.mapping(answer.get("containers"), f"{_ANSWER}: containers")
    return Traffic(
        pid=json_text.number(answer.get("pid"), f"{_ANSWER}: pid", _MOST),
        started=float(started),
        containers={_id(name): _relayed(json_text.mapping(one, name)) for name, one in containers.items()},
    )


def _id(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) <= 10):
        raise UsageError(f"{_ANSWER}: {shown(name)} is not a container's id")
    return int(name)


def _relayed(found: Mapping[str, Any]) -> Relayed:
    return Relayed(**{name: json_text.number(found.get(name), name, _MOST) for name in Relayed.__slots__})
