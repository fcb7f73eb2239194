"""From measurements to medians, ratios and judged bounds: pure functions on plain data, tested without a kernel."""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

BASELINE = "host"


class Kind(enum.StrEnum):
    """What a number is about; each kind has a table of its own."""

    MAIN = "main"
    LATENCY = "latency"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Metric:
    """What a workload's number is."""

    name: str
    title: str
    unit: str
    digits: int = 0
    more_is_better: bool = True
    kind: Kind = Kind.MAIN


@dataclass(frozen=True, slots=True)
class Bound:
    """A wanted ratio to the case ``of``; ``sign`` says on which side of ``limit``."""

    sign: str
    limit: float
    of: str

    def met(self, ratio: float) -> bool:
        """Whether ``ratio`` keeps the bound, with no rounding and no tolerance in its favour."""
        return _KEEPS[self.sign](ratio, self.limit)


_KEEPS: Mapping[str, Callable[[float, float], bool]] = {"≥": operator.ge, "≤": operator.le, ">": operator.gt}

Wanted = Mapping[str, Sequence[Bound]]
"""Workload -> the bounds of a case there."""


def at_least(limit: float, of: str = BASELINE) -> Bound:
    """A ratio of ``limit`` or more is wanted."""
    return Bound("≥", limit, of)


def at_most(limit: float, of: str = BASELINE) -> Bound:
    """A ratio of ``limit`` or less is wanted."""
    return Bound("≤", limit, of)


def more_than(limit: float, of: str = BASELINE) -> Bound:
    """A ratio above ``limit`` is wanted."""
    return Bound(">", limit, of)


def as_fast_as_host(connect: float) -> Wanted:
    """What is wanted where a socket is the host's own; ``connect``: of connect + close, the most."""
    return {
        "keepalive": [at_least(0.98)],
        "request": [at_least(0.95)],
        "pingpong": [at_least(0.98)],
        "bulk-in": [at_least(0.98)],
        "bulk-out": [at_least(0.98)],
        "connect": [at_most(connect)],
        "udp-pingpong": [at_least(0.97)],
        "udp-packets": [at_least(0.97)],
    }


@dataclass(frozen=True, slots=True)
class Column:
    """A case, as the report names it."""

    name: str
    title: str
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Ratio:
    """How a case compares with another: the median of the ratios in each round, the lowest and the highest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a bound. Nothing, where the other case was not measured."""

    bound: Bound
    ratio: Ratio | None
    met: bool | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What the rounds of one workload in one case come to; ``ratio`` is the one to the host."""

    values: tuple[float, ...]
    median: float
    ratio: Ratio | None
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """How the measurements came about, for whoever wants to repeat them."""

    command: str
    date: str
    kernel: str
    machine: str
    version: str
    rounds: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Omission:
    """What was not measured, and why; ``failed``: it should have been."""

    what: str
    why: str
    failed: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@dataclass(frozen=True, slots=True)
class Point:
    """The cost of a call with ``count`` of something: its median in microseconds, and the ratio to the host's."""

    count: int
    median: float
    ratio: Ratio

    @classmethod
    def of(cls, count: int, values: Sequence[float], base: Sequence[float]) -> Point:
        """From ``values`` and those of the host, one a round."""
        return cls(count, median(values), _ratio(values, base))


@dataclass(frozen=True, slots=True)
class Growth:
    """The cost of connect + close as something grows."""

    name: str
    title: str
    points: tuple[Point, ...] = ()

    def with_points(self, points: Sequence[Point]) -> Growth:
        """The same with what was measured."""
        return replace(self, points=tuple(points))


Measurements = Mapping[tuple[str, str], Sequence[float]]
"""(workload, case) -> one value a round."""


def summarize(values: Sequence[float], others: Mapping[str, Sequence[float]], wanted: Sequence[Bound]) -> Summary:
    """What ``values`` come to, beside those of the ``others`` (case -> one value a round).

    A case that is not among the others (the host for itself, what a run leaves out, a program that is not installed)
    gives no ratio, and a bound that is relative to it is not judged.
    """

    def ratio(of: str) -> Ratio | None:
        return _ratio(values, others[of]) if of in others else None

    def verdict(bound: Bound) -> Verdict:
        found = ratio(bound.of)
        return Verdict(bound, found, None if found is None else bound.met(found.median))

    return Summary(tuple(values), median(values), ratio(BASELINE), tuple(verdict(bound) for bound in wanted))


def _ratio(values: Sequence[float], base: Sequence[float]) -> Ratio:
    """Each value over that of its own round: the machine is another one a minute later."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def summaries(
    metrics: Sequence[Metric], columns: Sequence[Column], measurements: Measurements
) -> dict[tuple[str, str], Summary]:
    """A summary for each workload and case that was measured."""
    found = {}
    for metric in metrics:
        measured = {case: values for (workload, case), values in measurements.items() if workload == metric.name}
        for column in columns:
            if column.name in measured:
                others = {case: values for case, values in measured.items() if case != column.name}
                wanted = column.wanted.get(metric.name, ())
                found[metric.name, column.name] = summarize(measured[column.name], others, wanted)
    return found


@dataclass(frozen=True, slots=True)
class Results:
    """A whole run."""

    run: Run
    metrics: Sequence[Metric]
    columns: Sequence[Column]
    measurements: Measurements
    growth: Sequence[Growth] = ()
    omissions: Sequence[Omission] = ()

    @property
    def summaries(self) -> dict[tuple[str, str], Summary]:
        """A summary for each number and case that was measured."""
        return summaries(self.metrics, self.columns, self.measurements)

    def of_kind(self, kind: Kind) -> list[Metric]:
        """The numbers of that kind that any case has."""
        measured = {name for name, _ in self.measurements}
        return [metric for metric in self.metrics if metric.kind is kind and metric.name in measured]


def as_json(results: Results) -> dict[str, Any]:
    """Everything, as data for a file."""
    found = results.summaries
    return {
        "run": asdict(results.run),
        "workloads": [
            {
                **asdict(metric),
                "cases": {
                    column.name: asdict(found[metric.name, column.name])
                    for column in results.columns
                    if (metric.name, column.name) in found
                },
            }
            for metric in results.metrics
        ],
        "growth": [asdict(one) for one in results.growth],
        "not_measured": [asdict(one) for one in results.omissions],
    }
