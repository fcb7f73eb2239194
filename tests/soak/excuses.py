"""When a request may fail, and what of the rest has failed. Pure.

A failure is excused if the time of its request touches one in which its container was restarted, or in which docs/ tell
that such a request fails. Nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that failed, in seconds of CLOCK_MONOTONIC; ``who`` is the container that it was for, or of."""

    who: str
    begun: float
    ended: float
    what: str


@dataclass(frozen=True, slots=True)
class Excuse:
    """A time in which requests of a container may fail, and why."""

    who: str
    begun: float
    ended: float
    why: str
    rare: bool = False
    """Whether docs/ tell that single ones fail then, and not that they do: few are excused by it, of all together."""

    def covers(self, failure: Failure) -> bool:
        """Whether a failure's request was under way in this time."""
        return self.who == failure.who and failure.begun <= self.ended and self.begun <= failure.ended


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be thought of failures: ``rare`` are those that only rare excuses cover."""

    unexcused: tuple[Failure, ...]
    rare: tuple[Failure, ...]
    excused: int


def judge(failures: Sequence[Failure], excuses: Iterable[Excuse], few: int) -> Verdict:
    """Which failures nothing excuses. At most ``few`` are excused by a rare excuse; if there are more, none is."""
    known: dict[str, list[Excuse]] = {}
    for excuse in excuses:
        known.setdefault(excuse.who, []).append(excuse)
    left: list[Failure] = []
    rare: list[Failure] = []
    for one in failures:
        covering = [excuse for excuse in known.get(one.who, ()) if excuse.covers(one)]
        if not covering:
            left.append(one)
        elif all(excuse.rare for excuse in covering):
            rare.append(one)
    if len(rare) > few:
        left += rare
        rare = []
    return Verdict(tuple(left), tuple(rare), len(failures) - len(left))


def parse_worker(who: str, said: str) -> tuple[int, int, list[Failure], list[str]]:
    """What a container's own client (worker.c) has said: requests, forbidden ones tried, failures, forbidden ones that
    succeeded.
    """
    made = tried = 0
    failures, succeeded = [], []
    for line in said.splitlines():
        kind, *words = line.split(maxsplit=3)
        if kind == "count":
            made, tried = int(words[0]), int(words[1])
        elif kind == "failed":
            failures.append(Failure(who, float(words[0]), float(words[1]), f"out of the container: {words[2]}"))
        elif kind == "forbidden":
            succeeded.append(f"{who}: {line}")
    return made, tried, failures, succeeded
