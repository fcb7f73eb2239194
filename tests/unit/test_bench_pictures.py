"""The benchmark's results in a terminal, in a pipe, and as a picture."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from graft.bench import bars, pictures
from graft.bench.report import Column, Growth, Kind, Metric, Point, Results, Run

RATE = Metric("rate", "requests", "requests/s")
P99 = Metric("pingpong-p99", "ping-pong, p99", "us", 1, more_is_better=False, kind=Kind.LATENCY)
CPU = Metric("rate-cpu", "a request", "us", 1, more_is_better=False, kind=Kind.CPU)
RESULTS = Results(
    Run("graft bench", "2026-01-02", "6.1.0", "2 cores, x86_64", "0.1.0", 3, 1),
    [RATE, P99, CPU],
    [Column("host", "host", {}), Column("swap", "swap", {}), Column("socat", "socat", {})],
    {
        ("rate", "host"): [1000.0, 2000.0, 3000.0],
        ("rate", "swap"): [900.0, 2000.0, 3000.0],
        ("pingpong-p99", "host"): [40.0, 41.0, 42.0],
        ("pingpong-p99", "swap"): [40.0, 82.0, 84.0],
        ("rate-cpu", "host"): [4.0, 4.0, 4.0],
    },
    [Growth("rules", "rules", (Point.of(1, [2.0], [2.0]), Point.of(10000, [3.0], [2.0])))],
)


def test_in_a_pipe_there_is_a_row_for_each_figure_that_was_measured() -> None:
    assert bars.rows(RESULTS) == [
        ("rate", "host", "2000.0", "requests/s", "-", "-", "-"),
        ("rate", "swap", "2000.0", "requests/s", "1.000", "0.900", "1.000"),
        ("pingpong-p99", "host", "41.0", "us", "-", "-", "-"),
        ("pingpong-p99", "swap", "82.0", "us", "2.000", "1.000", "2.000"),
        ("rate-cpu", "host", "4.0", "us", "-", "-", "-"),
        ("rules", "1", "2.0", "us", "1.000", "1.000", "1.000"),
        ("rules", "10000", "3.0", "us", "1.500", "1.500", "1.500"),
    ]


def test_in_a_terminal_a_bar_is_as_long_as_its_ratio() -> None:
    said = io.StringIO()
    Console(file=said, width=100).print(*bars.tables(RESULTS), sep="\n")
    lines = said.getvalue().splitlines()
    assert [line.strip() for line in lines if not line.startswith(" ")] == [
        "requests (requests/s)",
        "latency: ping-pong (us)",
        "CPU time: a request (us; less is better)",
        "connect + close in direct, by rules (us; less is better)",
    ]
    few, many = (line for line in lines if "(1.00-1.00)" in line or "(1.50-1.50)" in line)
    assert many.count("\u2501") == pytest.approx(1.5 * few.count("\u2501"), abs=1)
    assert many.rstrip().endswith("1.500  (1.50-1.50)")
    assert [line.split() for line in lines if "p99" in line or "82.0" in line] == [["p99"], ["swap", "82.0"]]


@pytest.mark.parametrize("suffix", pictures.SUFFIXES)
def test_each_kind_of_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    from graft.bench import chart

    target = tmp_path / f"bench{suffix}"
    chart.draw(RESULTS, target)
    assert target.stat().st_size > 1000


def test_a_picture_of_nothing_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from graft.bench import chart

    chart.draw(Results(RESULTS.run, [], [], {}), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").exists()
