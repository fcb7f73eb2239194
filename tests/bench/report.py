"""From measurements to a table: pure functions on plain data, tested without a kernel."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
BASELINE = "host"


@dataclass(frozen=True, slots=True)
class Metric:
    """What a workload's number is."""

    name: str
    title: str
    unit: str
    digits: int = 0
    more_is_better: bool = True


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


def as_json(
    run: Run, metrics: Sequence[Metric], columns: Sequence[Column], measurements: Measurements
) -> dict[str, Any]:
    """Everything, as data for a file."""
    found = summaries(metrics, columns, measurements)
    return {
        "run": asdict(run),
        "workloads": [
            {
                **asdict(metric),
                "cases": {
                    column.name: asdict(found[metric.name, column.name])
                    for column in columns
                    if (metric.name, column.name) in found
                },
            }
            for metric in metrics
        ],
    }


def as_markdown(run: Run, metrics: Sequence[Metric], columns: Sequence[Column], measurements: Measurements) -> str:
    """The table, with what it takes to repeat it above."""
    found = summaries(metrics, columns, measurements)
    lines = [
        f"`{run.command}` on {run.date}: Graft {run.version}, Linux {run.kernel}, {run.machine}; "
        f"medians of {run.rounds} rounds of {run.seconds:g} s.",
        "",
        "| workload | unit | " + " | ".join(column.title for column in columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for metric in metrics:
        cells = [_cell(metric, found.get((metric.name, column.name))) for column in columns]
        lines.append(f"| {metric.title} | {metric.unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(metric: Metric, summary: Summary | None) -> str:
    if summary is None:
        return "-"
    cell = f"{summary.median:,.{metric.digits}f}"
    if summary.ratio is not None:
        cell += f" = **{summary.ratio.median:.3f}** ({summary.ratio.low:.2f}-{summary.ratio.high:.2f})"
    return ", ".join([cell, *(_outcome(verdict) for verdict in summary.verdicts if verdict.met is not None)])


def _outcome(verdict: Verdict) -> str:
    """The bound and whether it is met, after the ratio where that is not the one to the host, which the cell has."""
    bound, ratio = verdict.bound, verdict.ratio
    text = f"{bound.sign} {bound.limit:g} {'met' if verdict.met else 'missed'}"
    return text if ratio is None or bound.of == BASELINE else f"{ratio.median:.3f} of {bound.of} {text}"


def with_table(document: str, table: str) -> str:
    """``document`` with ``table`` between its markers; at its end, with new markers, where it has none."""
    block = f"{BEGIN}\n{table}\n{END}"
    start, end = document.find(BEGIN), document.find(END)
    if start < 0 or end < start:
        return f"{document.rstrip()}\n\n{block}\n".lstrip()
    return document[:start] + block + document[end + len(END) :]
