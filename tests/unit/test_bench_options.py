"""What a run of the benchmark measures, and how long it takes at the most."""

from __future__ import annotations

import pytest

from graft.bench.command import CASES
from graft.bench.options import QUICK_CASES, QUICK_WORKLOADS, Options, Wishes, choose
from graft.bench.workloads import WORKLOADS
from graft.errors import UsageError


def chosen(wishes: Wishes | None = None) -> Options:
    return choose(wishes or Wishes(), CASES, WORKLOADS)


def test_a_whole_run_has_everything() -> None:
    options = chosen()
    assert list(options.cases) == list(CASES) and list(options.workloads) == list(WORKLOADS)
    assert (max(options.rules), max(options.containers)) == (10000, 200)


def test_a_quick_run_takes_about_a_minute() -> None:
    options = chosen(Wishes(quick=True))
    assert {case.name for case in options.cases} == set(QUICK_CASES)
    assert {work.metric.name for work in options.workloads} < set(QUICK_WORKLOADS)
    assert 30 < options.expected < 120


def test_the_quick_names_exist() -> None:
    assert set(QUICK_CASES) <= {case.name for case in CASES}
    assert set(QUICK_WORKLOADS) <= {work.metric.name for work in WORKLOADS} | {"rules", "containers"}


def test_the_host_is_always_measured() -> None:
    assert [case.name for case in chosen(Wishes(cases="swap")).cases] == ["host", "swap"]


def test_chosen_workloads_keep_their_order_and_growth_is_one_of_them() -> None:
    options = chosen(Wishes(workloads="rules,connect, pingpong"))
    assert [work.metric.name for work in options.workloads] == ["pingpong", "connect"]
    assert options.rules and not options.containers


@pytest.mark.parametrize(
    ("wishes", "option"), [(Wishes(cases="host,moon"), "--cases"), (Wishes(workloads="connect,moon"), "--workloads")]
)
def test_an_unknown_name_is_an_error_that_names_the_option_and_those_that_there_are(
    wishes: Wishes, option: str
) -> None:
    with pytest.raises(UsageError, match=f"{option}: 'moon' not known") as error:
        chosen(wishes)
    assert "some of " in (error.value.hint or "")


def test_the_time_that_is_given_is_the_limit_and_growth_keeps_its_part() -> None:
    options = chosen(Wishes(minutes=10))
    assert options.limit == 600
    assert 0 < options.limit_of_cases < 600


def test_without_a_time_the_limit_is_computed() -> None:
    options = chosen()
    assert options.limit > options.expected > 0


def test_growth_alone_has_all_the_time() -> None:
    options = chosen(Wishes(workloads="rules"))
    assert not options.workloads and options.rules and options.limit > 0
