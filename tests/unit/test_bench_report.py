"""The benchmark's arithmetic, its table, and which cases are measured."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graft.bench.cases import Case, PlainCase
from graft.bench.command import CASES
from graft.bench.own_graft import OwnGraft
from graft.bench.process import BenchError
from graft.bench.proxies import ProxyCase
from graft.bench.report import (
    Column,
    Growth,
    Kind,
    Measurements,
    Metric,
    Omission,
    Point,
    Ratio,
    Results,
    Run,
    as_json,
    at_least,
    at_most,
    more_than,
    summarize,
)
from graft.bench.runner import Clock, measure_all
from graft.bench.scratch import Scratch
from graft.bench.tables import BEGIN, END, as_markdown, with_table
from graft.bench.topology import Netns, Topology
from graft.bench.workloads import WORKLOADS, Place
from graft.model.settings import Settings

RUN = Run("make bench", "2026-01-02", "6.1.0", "2 cores, x86_64", "0.1.0", 3, 3)
RATE = Metric("rate", "requests", "requests/s")
TIME = Metric("time", "connect", "us", digits=1, more_is_better=False)
HOST = Column("host", "host", {})
SWAP = Column("swap", "swap", {"rate": [at_least(0.98)], "time": [at_most(2.5)]})
BRIDGE = Column("bridge", "bridge + NAT", {})
SPLICE = Column("splice", "splice", {"rate": [at_least(0.9, of="bridge"), more_than(1, of="socat")]})
MEASUREMENTS: dict[tuple[str, str], list[float]] = {
    ("rate", "host"): [1000, 2000, 3000],
    ("rate", "swap"): [990, 1900, 3030],
    ("rate", "bridge"): [800, 1000, 2000],
    ("rate", "splice"): [400, 920, 2000],
    ("rate", "socat"): [500, 920, 1000],
    ("time", "host"): [40.0, 40.0, 40.0],
    ("time", "swap"): [80.0, 120.0, 120.0],
}


GRAFT = OwnGraft(Settings.from_environment({}), Path())
NET = Topology(Netns("host"), Netns("client"), Netns("container"), Scratch("graft-bench-0"), GRAFT)
PLACE = Place(NET, seconds=1)
HOST_CASE = PlainCase("host", "host", lambda net: net.host, 80, 80)
MISSING_CASE = ProxyCase("missing", "a missing proxy", "/nonexistent/proxy", 81, lambda _folder, _port, _protocol: [])


@dataclass(frozen=True)
class Always:
    """A workload that always measures the same."""

    metric: Metric
    value: float
    needs: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (self.metric,)

    def measure(self, _case: Case, _place: Place) -> dict[str, float]:
        return {self.metric.name: self.value}


@dataclass(frozen=True)
class FailsOnce(Always):
    """A workload that fails in the case ``where`` in its second round."""

    where: str = "host"
    begun: list[str] = field(default_factory=list)

    def measure(self, case: Case, place: Place) -> dict[str, float]:
        self.begun.append(case.name)
        if case.name == self.where and self.begun.count(case.name) == 2:
            raise BenchError("no answer\nat all")
        return {self.metric.name: self.value}


def results(metrics: list[Metric], columns: list[Column], measured: Measurements, growth: Any = ()) -> Results:
    return Results(RUN, metrics, columns, measured, growth)


def unlimited() -> Clock:
    return Clock(math.inf)


def test_a_ratio_is_taken_within_its_round_and_then_the_median() -> None:
    summary = summarize([990, 1900, 3030], {"host": [1000, 2000, 3000]}, [at_least(0.98)])
    assert summary.median == 1900
    assert summary.ratio == Ratio(0.99, 0.95, 1.01)
    assert [verdict.met for verdict in summary.verdicts] == [True]


def test_a_bound_that_is_relative_to_another_case_is_judged_by_the_rounds_of_that_case() -> None:
    others = {"host": [1000.0, 1000.0, 1000.0], "bridge": [800.0, 1000.0, 2000.0]}
    summary = summarize([400, 920, 2000], others, [at_least(0.9, of="bridge")])
    assert summary.ratio == Ratio(0.92, 0.4, 2)
    (verdict,) = summary.verdicts
    assert verdict.ratio == Ratio(0.92, 0.5, 1)
    assert verdict.met is True


def test_each_of_several_bounds_is_judged_on_its_own() -> None:
    others = {"docker-proxy": [10.0], "socat": [30.0]}
    summary = summarize([20], others, [more_than(1, of="docker-proxy"), more_than(1, of="socat")])
    assert [verdict.met for verdict in summary.verdicts] == [True, False]


def test_without_the_host_nothing_that_is_relative_to_it_is_judged() -> None:
    summary = summarize([1, 2, 3], {"bridge": [1.0, 2.0, 3.0]}, [at_least(0.98), at_least(1, of="bridge")])
    assert (summary.median, summary.ratio) == (2, None)
    assert [verdict.met for verdict in summary.verdicts] == [None, True]


def test_a_bound_whose_other_case_was_not_measured_is_not_judged() -> None:
    summary = summarize([1, 2, 3], {"host": [1.0, 2.0, 3.0]}, [more_than(1, of="socat")])
    (verdict,) = summary.verdicts
    assert (verdict.ratio, verdict.met) == (None, None)


def test_rounds_that_do_not_match_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        summarize([1, 2, 3], {"host": [1.0, 2.0]}, [])


def test_a_bound_is_not_met_by_rounding() -> None:
    assert not at_least(0.98).met(0.9799)
    assert at_least(0.98).met(0.98)
    assert not at_most(2.5).met(2.5001)
    assert at_most(2.5).met(2.5)
    assert not more_than(1).met(1)
    assert more_than(1).met(1.0001)


def test_every_bound_speaks_of_a_workload_and_of_another_case() -> None:
    workloads, cases = {workload.metric.name for workload in WORKLOADS}, {case.name for case in CASES}
    for case in CASES:
        assert set(case.wanted) <= workloads
        assert {bound.of for bounds in case.wanted.values() for bound in bounds} <= cases - {case.name}


def test_the_table_has_a_row_a_workload_and_marks_what_is_met_and_missed() -> None:
    lines = as_markdown(results([RATE, TIME], [HOST, SWAP], MEASUREMENTS)).splitlines()
    assert lines[0].startswith("`make bench` on 2026-01-02: Graft 0.1.0, Linux 6.1.0")
    assert lines[2] == "| workload | unit | host | swap |"
    assert lines[4] == "| requests | requests/s | 2,000 | 1,900 = **0.990** (0.95-1.01), ≥ 0.98 met |"
    assert lines[5] == "| connect | us | 40.0 | 120.0 = **3.000** (2.00-3.00), ≤ 2.5 missed |"


def test_a_cell_says_each_bound_with_its_own_ratio() -> None:
    row = as_markdown(results([RATE], [HOST, SPLICE], MEASUREMENTS)).splitlines()[-1]
    splice = "920 = **0.460** (0.40-0.67), 0.920 of bridge ≥ 0.9 met, 1.000 of socat > 1 missed"
    assert row == f"| requests | requests/s | 2,000 | {splice} |"


def test_a_cell_leaves_out_what_is_not_judged() -> None:
    measured = {case: values for case, values in MEASUREMENTS.items() if case[1] in ("bridge", "splice")}
    row = as_markdown(results([RATE], [BRIDGE, SPLICE], measured)).splitlines()[-1]
    assert row == "| requests | requests/s | 1,000 | 920, 0.920 of bridge ≥ 0.9 met |"


def test_what_was_not_measured_is_a_dash() -> None:
    lines = as_markdown(results([RATE], [HOST, SWAP], {("rate", "host"): [1.0]})).splitlines()
    assert lines[-1] == "| requests | requests/s | 1 | - |"


def test_the_json_holds_every_round_and_the_outcome_of_each_bound() -> None:
    measured = {case: values for case, values in MEASUREMENTS.items() if case[1] != "socat"}
    data = json.loads(json.dumps(as_json(results([RATE, TIME], [HOST, SWAP, SPLICE], measured))))
    rate = data["workloads"][0]["cases"]
    assert data["run"]["kernel"] == "6.1.0"
    assert rate["swap"]["values"] == [990, 1900, 3030]
    assert [verdict["met"] for verdict in rate["swap"]["verdicts"]] == [True]
    assert (rate["host"]["ratio"], rate["host"]["verdicts"]) == (None, [])
    assert rate["splice"]["verdicts"] == [
        {
            "bound": {"sign": "≥", "limit": 0.9, "of": "bridge"},
            "ratio": {"median": 0.92, "low": 0.5, "high": 1.0},
            "met": True,
        },
        {"bound": {"sign": ">", "limit": 1, "of": "socat"}, "ratio": None, "met": None},
    ]


def test_the_table_replaces_the_one_between_the_markers_and_nothing_else() -> None:
    document = f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    once = with_table(document, "new")
    assert once == f"# Title\n\n{BEGIN}\nnew\n{END}\n\nafter\n"
    assert with_table(once, "new") == once


def test_a_document_without_markers_gets_the_table_at_its_end() -> None:
    assert with_table("# Title\n", "new") == f"# Title\n\n{BEGIN}\nnew\n{END}\n"
    assert with_table("", "new") == f"{BEGIN}\nnew\n{END}\n"


def test_each_kind_of_number_has_a_table_and_growth_has_one() -> None:
    p99 = Metric("rate-p99", "a request, p99", "us", 1, more_is_better=False, kind=Kind.LATENCY)
    cpu = Metric("rate-cpu", "a request", "us", 1, more_is_better=False, kind=Kind.CPU)
    measured = {(one.name, "host"): [2.0] for one in (RATE, p99, cpu)}
    growth = [Growth("rules", "rules").with_points([Point.of(10000, [3.0, 5.0, 4.0], [2.0, 2.0, 2.0])])]
    tables = as_markdown(results([RATE, p99, cpu], [HOST], measured, growth)).split("\n\n")
    assert [table.splitlines()[-1] for table in tables[1:]] == [
        "| requests | requests/s | 2 |",
        "Latency, in microseconds:",
        "| a request, p99 | us | 2.0 |",
        "CPU time of everything that was started, in microseconds:",
        "| a request | us | 2.0 |",
        "Connect + close in transport direct, as there are more:",
        "| rules | 10,000 | 4.0 | **2.000** (1.50-2.50) |",
    ]


def test_a_case_that_is_not_offered_is_left_out_with_its_reason_and_the_others_are_measured() -> None:
    said = io.StringIO()
    found = measure_all([Always(RATE, 7)], [MISSING_CASE, HOST_CASE], PLACE, 2, unlimited(), Console(file=said))
    assert found.values == {("rate", "host"): [7, 7]}
    assert "not measured: a missing proxy: /nonexistent/proxy is not installed\n" in said.getvalue()
    assert found.omissions == [Omission("a missing proxy", "/nonexistent/proxy is not installed")]


def test_a_run_in_which_no_case_is_offered_is_an_error() -> None:
    with pytest.raises(BenchError, match="none of the cases"):
        measure_all([Always(RATE, 7)], [MISSING_CASE], PLACE, 1, unlimited(), Console(file=io.StringIO()))


def test_a_workload_whose_program_is_missing_is_left_out_with_its_reason() -> None:
    workloads = [Always(RATE, 7), Always(TIME, 8, needs=("no-such-program",))]
    found = measure_all(workloads, [HOST_CASE], PLACE, 1, unlimited(), Console(file=io.StringIO()))
    assert found.values == {("rate", "host"): [7]}
    assert found.omissions == [Omission("connect", "no-such-program is not installed")]


def test_what_fails_in_a_later_round_is_left_out_and_the_rest_is_measured() -> None:
    workload = FailsOnce(RATE, 7, where="again")
    again = PlainCase("again", "host again", lambda net: net.host, 80, 80)
    found = measure_all([workload], [HOST_CASE, again], PLACE, 3, unlimited(), Console(file=io.StringIO()))
    assert found.values == {("rate", "host"): [7, 7, 7]}
    assert found.omissions == [Omission("requests, host again", "no answer at all", failed=True)]
    assert workload.begun.count("again") == 2


def test_a_round_that_the_time_cuts_off_does_not_count() -> None:
    now = itertools.count()
    clock = Clock(8, lambda: float(next(now)))
    again = PlainCase("again", "host again", lambda net: net.host, 80, 80)
    found = measure_all([Always(RATE, 7)], [HOST_CASE, again], PLACE, 3, clock, Console(file=io.StringIO()))
    assert found.values == {("rate", "host"): [7], ("rate", "again"): [7]}
    assert {one.why for one in found.omissions} == {"the time is up"}


def test_a_block_begins_only_if_one_like_the_longest_fits() -> None:
    times = iter([0.0, 3.0, 3.0, 8.0])
    clock = Clock(10, lambda: next(times))
    with clock.block():
        pass
    assert clock.has_room()
    assert not clock.has_room()
