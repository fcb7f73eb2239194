"""How long supervisors took for calls, as `graft top` shows it: bounds, bars, JSON. Pure.

Imported where it is needed, because it has the kernel's structures imported, which other commands do without.
"""

from __future__ import annotations

import math
from typing import Any

from graft.state.call_times import BOUNDS, NANOSECONDS, CallTimes

_UNITS = (("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000))
_BAR = 40  # columns of the longest bar


def quantile(calls: CallTimes | None, share: float) -> str:
    """``<=50us``: what this share of the calls took at most, as far as a histogram knows. ``-`` where there is none."""
    if calls is None or not calls.count:
        return "-"
    bound = calls.quantile(share)
    return _BEYOND if bound is None else f"<={_time(bound)}"


def bars(calls: CallTimes | None) -> list[str]:
    """The histogram in lines, from the first bucket with a call to the last; none where there was no call."""
    if calls is None or not calls.count:
        return []
    names = [*(f"<={_time(bound)}" for bound in BOUNDS), _BEYOND]
    used = [index for index, count in enumerate(calls.counts) if count]
    most = max(calls.counts)
    lines = [
        f"{name:>8} {count:>8} {'#' * math.ceil(count * _BAR / most)}".rstrip()
        for name, count in list(zip(names, calls.counts, strict=True))[used[0] : used[-1] + 1]
    ]
    return ["", "calls, by how long a supervisor took", *lines]


def record(calls: CallTimes) -> dict[str, Any]:
    """For JSON: how many calls took at most so many seconds, and more than the bound before. None: there is none."""
    bounds: list[float | None] = [*(bound / NANOSECONDS for bound in BOUNDS), None]
    return {
        "count": calls.count,
        "seconds": calls.total / NANOSECONDS,
        "buckets": [{"at_most": at, "count": count} for at, count in zip(bounds, calls.counts, strict=True)],
    }


def _time(nanoseconds: int) -> str:
    unit, size = next(one for one in _UNITS if nanoseconds >= one[1])
    return f"{nanoseconds // size}{unit}"


_BEYOND = f">{_time(BOUNDS[-1])}"
