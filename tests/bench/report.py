"""From measurements to a table: pure functions on plain data, tested without a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """A wanted ratio to the host: at least or at most ``limit``."""

    limit: float
    at_least: bool

    def met(self, ratio: float) -> bool:
        """Whether ``ratio`` keeps the bound, with no rounding in its favour."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


def at_least(limit: float) -> Bound:
    """A ratio of ``limit`` or more is wanted."""
    return Bound(limit, at_least=True)


def at_most(limit: float) -> Bound:
    """A ratio of ``limit`` or less is wanted."""
    return Bound(limit, at_least=False)


@dataclass(frozen=True, slots=True)
class Column:
    """A case, as the report names it."""

    name: str
    title: str
    wanted: Mapping[str, Bound]


@dataclass(frozen=True, slots=True)
class Summary:
    """What the rounds of one workload in one case come to."""

    values: tuple[float, ...]
    median: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    wanted: str | None
    met: bool | None


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


def summarize(values: Sequence[float], baseline: Sequence[float] | None, wanted: Bound | None) -> Summary:
    """Medians of ``values`` and of their ratios to ``baseline``, each to the value of its own round.

    Without a baseline (the host itself, or a run without it) there are no ratios, and nothing is met or missed.
    """
    ratios = [value / base for value, base in zip(values, baseline, strict=True)] if baseline is not None else []
    ratio = median(ratios) if ratios else None
    return Summary(
        values=tuple(values),
        median=median(values),
        ratio=ratio,
        ratio_low=min(ratios, default=None),
        ratio_high=max(ratios, default=None),
        wanted=str(wanted) if wanted else None,
        met=wanted.met(ratio) if wanted and ratio is not None else None,
    )


def summaries(
    metrics: Sequence[Metric], columns: Sequence[Column], measurements: Measurements
) -> dict[tuple[str, str], Summary]:
    """A summary for each workload and case that was measured."""
    return {
        (metric.name, column.name): summarize(
            measurements[metric.name, column.name],
            measurements.get((metric.name, BASELINE)) if column.name != BASELINE else None,
            column.wanted.get(metric.name),
        )
        for metric in metrics
        for column in columns
        if (metric.name, column.name) in measurements
    }


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
    value = f"{summary.median:,.{metric.digits}f}"
    if summary.ratio is None:
        return value
    cell = f"{value} = **{summary.ratio:.3f}** ({summary.ratio_low:.2f}-{summary.ratio_high:.2f})"
    if summary.met is None:
        return cell
    return f"{cell}, {summary.wanted} {'met' if summary.met else 'missed'}"


def with_table(document: str, table: str) -> str:
    """``document`` with ``table`` between its markers; at its end, with new markers, where it has none."""
    block = f"{BEGIN}\n{table}\n{END}"
    start, end = document.find(BEGIN), document.find(END)
    if start < 0 or end < start:
        return f"{document.rstrip()}\n\n{block}\n".lstrip()
    return document[:start] + block + document[end + len(END) :]
