"""The results in a terminal: a bar for each case, as long as its ratio to the host. Pure, but for rich."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich.progress_bar import ProgressBar
from rich.table import Table

from graft.bench.report import BASELINE, Growth, Kind, Metric, Ratio, Results

TITLE = ("FIGURE", "CASE", "VALUE", "UNIT", "RATIO", "LOWEST", "HIGHEST")
_WIDTH = 30
_NAME_WIDTH = 22


def rows(results: Results) -> list[tuple[str, ...]]:
    """A row for each figure: number, case, median, unit, and the ratio to the host with its spread ("-": none)."""
    found = results.summaries
    listed: list[tuple[str, ...]] = []
    for metric in results.metrics:
        for column in results.columns:
            if (metric.name, column.name) in found:
                summary = found[metric.name, column.name]
                value = f"{summary.median:.{max(metric.digits, 1)}f}"
                listed.append((metric.name, column.name, value, metric.unit, *_ratio(summary.ratio)))
    for growth in results.growth:
        for point in growth.points:
            listed.append((growth.name, str(point.count), f"{point.median:.1f}", "us", *_ratio(point.ratio)))
    return listed


def _ratio(ratio: Ratio | None) -> tuple[str, str, str]:
    if ratio is None:
        return "-", "-", "-"
    return f"{ratio.median:.3f}", f"{ratio.low:.3f}", f"{ratio.high:.3f}"


def tables(results: Results) -> Iterator[Table]:
    """A table with bars for each main figure; the percentiles of each workload; bars for CPU time and growth."""
    for metric in results.of_kind(Kind.MAIN):
        yield _of_metric(results, metric, metric.title)
    for title, group in itertools.groupby(
        results.of_kind(Kind.LATENCY), lambda metric: metric.title.rpartition(", ")[0]
    ):
        yield _of_percentiles(results, title, list(group))
    for metric in results.of_kind(Kind.CPU):
        yield _of_metric(results, metric, f"CPU time: {metric.title}")
    for growth in results.growth:
        yield _of_growth(growth)


def _of_percentiles(results: Results, title: str, metrics: Sequence[Metric]) -> Table:
    """Without bars: what differs in the rarest rounds is seen by the numbers."""
    found = results.summaries
    table = _titled(f"latency: {title} (us)", show_header=True)
    table.add_column(min_width=_NAME_WIDTH)
    for metric in metrics:
        table.add_column(metric.title.rpartition(", ")[2], justify="right", min_width=9)
    for column in results.columns:
        medians = [found[one.name, column.name].median for one in metrics if (one.name, column.name) in found]
        if medians:
            table.add_row(column.title, *(f"{value:,.1f}" for value in medians))
    return table


def _of_metric(results: Results, metric: Metric, title: str) -> Table:
    found = results.summaries
    better = "" if metric.more_is_better else "; less is better"
    table = _table(f"{title} ({metric.unit}{better})")
    shown = [
        (column, found[metric.name, column.name]) for column in results.columns if (metric.name, column.name) in found
    ]
    longest = max(summary.ratio.median if summary.ratio else 1.0 for _, summary in shown)
    for column, summary in shown:
        share = summary.ratio.median if summary.ratio else 1.0 if column.name == BASELINE else 0.0
        value = f"{summary.median:,.{metric.digits}f}"
        table.add_row(column.title, value, _bar(share, longest), *_spread(summary.ratio))
    return table


def _of_growth(growth: Growth) -> Table:
    table = _table(f"connect + close in direct, by {growth.title} (us; less is better)")
    longest = max(point.ratio.median for point in growth.points)
    for point in growth.points:
        bar = _bar(point.ratio.median, longest)
        table.add_row(f"{point.count:,}", f"{point.median:,.1f}", bar, *_spread(point.ratio))
    return table


def _table(title: str) -> Table:
    table = _titled(title, show_header=False)
    table.add_column(min_width=_NAME_WIDTH)
    table.add_column(justify="right", min_width=9)
    table.add_column(width=_WIDTH)
    table.add_column(justify="right")
    table.add_column(style="dim")
    return table


def _titled(title: str, show_header: bool) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, show_header=show_header)


def _bar(share: float, longest: float) -> ProgressBar:
    return ProgressBar(total=longest, completed=share, width=_WIDTH, finished_style="bar.complete")


def _spread(ratio: Ratio | None) -> tuple[str, str]:
    return ("", "") if ratio is None else (f"{ratio.median:.3f}", f"({ratio.low:.2f}-{ratio.high:.2f})")
