"""The benchmark's arithmetic and its table."""

from __future__ import annotations

import json

import pytest

from tests.bench.process import BenchError
from tests.bench.report import (
    BEGIN,
    END,
    Column,
    Metric,
    Run,
    as_json,
    as_markdown,
    at_least,
    at_most,
    summarize,
    with_table,
)
from tests.bench.workloads import gigabits, median_us, requests_per_second

RUN = Run("make bench", "2026-01-02", "6.1.0", "2 cores, x86_64", "0.1.0", 3, 3)
RATE = Metric("rate", "requests", "requests/s")
TIME = Metric("time", "connect", "us", digits=1, more_is_better=False)
HOST = Column("host", "host", {})
SWAP = Column("swap", "swap", {"rate": at_least(0.98), "time": at_most(2.5)})
MEASUREMENTS: dict[tuple[str, str], list[float]] = {
    ("rate", "host"): [1000, 2000, 3000],
    ("rate", "swap"): [990, 1900, 3030],
    ("time", "host"): [40.0, 40.0, 40.0],
    ("time", "swap"): [80.0, 120.0, 120.0],
}


def test_a_ratio_is_taken_within_its_round_and_then_the_median() -> None:
    summary = summarize([990, 1900, 3030], [1000, 2000, 3000], at_least(0.98))
    assert summary.median == 1900
    assert summary.ratio == pytest.approx(0.99)
    assert (summary.ratio_low, summary.ratio_high) == pytest.approx((0.95, 1.01))
    assert summary.met is True


def test_without_a_baseline_nothing_is_met_or_missed() -> None:
    summary = summarize([1, 2, 3], None, at_least(0.98))
    assert (summary.median, summary.ratio, summary.met) == (2, None, None)


def test_rounds_that_do_not_match_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        summarize([1, 2, 3], [1, 2], None)


def test_a_bound_is_not_met_by_rounding() -> None:
    assert not at_least(0.98).met(0.9799)
    assert at_least(0.98).met(0.98)
    assert not at_most(2.5).met(2.5001)
    assert at_most(2.5).met(2.5)


def test_the_table_has_a_row_a_workload_and_marks_what_is_met_and_missed() -> None:
    lines = as_markdown(RUN, [RATE, TIME], [HOST, SWAP], MEASUREMENTS).splitlines()
    assert lines[0].startswith("`make bench` on 2026-01-02: Graft 0.1.0, Linux 6.1.0")
    assert lines[2] == "| workload | unit | host | swap |"
    assert lines[4] == "| requests | requests/s | 2,000 | 1,900 = **0.990** (0.95-1.01), ≥ 0.98 met |"
    assert lines[5] == "| connect | us | 40.0 | 120.0 = **3.000** (2.00-3.00), ≤ 2.5 missed |"


def test_what_was_not_measured_is_a_dash() -> None:
    lines = as_markdown(RUN, [RATE], [HOST, SWAP], {("rate", "host"): [1.0]}).splitlines()
    assert lines[-1] == "| requests | requests/s | 1 | - |"


def test_the_json_holds_every_round_and_the_outcome() -> None:
    data = json.loads(json.dumps(as_json(RUN, [RATE, TIME], [HOST, SWAP], MEASUREMENTS)))
    rate = data["workloads"][0]
    assert data["run"]["kernel"] == "6.1.0"
    assert rate["cases"]["swap"]["values"] == [990, 1900, 3030]
    assert rate["cases"]["swap"]["met"] is True
    assert rate["cases"]["host"]["ratio"] is None


def test_the_table_replaces_the_one_between_the_markers_and_nothing_else() -> None:
    document = f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    once = with_table(document, "new")
    assert once == f"# Title\n\n{BEGIN}\nnew\n{END}\n\nafter\n"
    assert with_table(once, "new") == once


def test_a_document_without_markers_gets_the_table_at_its_end() -> None:
    assert with_table("# Title\n", "new") == f"# Title\n\n{BEGIN}\nnew\n{END}\n"
    assert with_table("", "new") == f"{BEGIN}\nnew\n{END}\n"


def test_the_rate_of_wrk_is_read_and_bad_answers_are_an_error() -> None:
    assert requests_per_second("Requests/sec:  86903.12\nTransfer/sec: 1MB\n") == 86903.12
    with pytest.raises(BenchError, match="measured nothing"):
        requests_per_second("  Non-2xx or 3xx responses: 5\nRequests/sec:  86903.12\n")
    with pytest.raises(BenchError, match="measured nothing"):
        requests_per_second("unable to connect")


def test_the_rate_of_iperf3_is_what_arrived() -> None:
    assert gigabits('{"end": {"sum_received": {"bits_per_second": 9.5e9}}}') == 9.5
    with pytest.raises(BenchError, match="measured nothing"):
        gigabits('{"error": "unable to connect"}')


def test_the_median_of_the_peer_is_read() -> None:
    assert median_us('{"median_us": 41.5, "count": 3}\n') == 41.5
