"""The results as Markdown tables, for docs/performance.md. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from graft.bench.report import BASELINE, Growth, Kind, Metric, Results, Summary, Verdict

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"

_TITLES = {
    Kind.LATENCY: "Latency, in microseconds:",
    Kind.CPU: "CPU time of everything that was started, in microseconds:",
}


def as_markdown(results: Results) -> str:
    """The tables, with what it takes to repeat them above."""
    run = results.run
    blocks = [
        f"`{run.command}` on {run.date}: Graft {run.version}, Linux {run.kernel}, {run.machine}; "
        f"medians of {run.rounds} rounds of {run.seconds:g} s.",
        _table(results, results.of_kind(Kind.MAIN)),
    ]
    for kind, title in _TITLES.items():
        if metrics := results.of_kind(kind):
            blocks += [title, _table(results, metrics)]
    if results.growth:
        blocks += ["Connect + close in transport direct, as there are more:", _growth_table(results.growth)]
    return "\n\n".join(blocks)


def _table(results: Results, metrics: Sequence[Metric]) -> str:
    found, columns = results.summaries, results.columns
    lines = [
        "| workload | unit | " + " | ".join(column.title for column in columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for metric in metrics:
        cells = [_cell(metric, found.get((metric.name, column.name))) for column in columns]
        lines.append(f"| {metric.title} | {metric.unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _growth_table(growths: Sequence[Growth]) -> str:
    lines = ["| of what | how many | us | ratio to the host |", "| --- | ---: | ---: | ---: |"]
    for growth in growths:
        for point in growth.points:
            ratio = f"**{point.ratio.median:.3f}** ({point.ratio.low:.2f}-{point.ratio.high:.2f})"
            lines.append(f"| {growth.title} | {point.count:,} | {point.median:,.1f} | {ratio} |")
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
