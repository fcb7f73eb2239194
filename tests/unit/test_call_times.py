"""How long supervisors take for calls: slots that are taken, left and taken again; what is read; how it is shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from graft.model.settings import Settings
from graft.state import call_times
from graft.state.call_times import BOUNDS, CallTimer, CallTimes
from graft_cli.call_times import bars, quantile, record


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path / "run")})


def taken(settings: Settings, container: int = 7) -> CallTimer:
    timer = call_times.take(settings, container)
    assert timer is not None
    return timer


def in_child(work: Callable[[], object]) -> None:
    """A supervisor: its lock on a slot ends with it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def counted(settings: Settings, *times: int) -> None:
    def work() -> None:
        timer = taken(settings)
        for time in times:
            timer.add(time)

    in_child(work)


def test_a_container_without_a_supervisor_has_none(settings: Settings) -> None:
    assert call_times.read(settings, 7) is None


def test_a_bound_belongs_to_its_bucket_and_what_is_beyond_all_is_counted(settings: Settings) -> None:
    counted(settings, 0, BOUNDS[0], BOUNDS[0] + 1, BOUNDS[-1], BOUNDS[-1] + 1)
    found = call_times.read(settings, 7)
    assert found is not None
    assert (found.counts[:2], found.counts[-2:], found.count) == ((2, 1), (1, 1), 5)
    assert found.total == 2 * BOUNDS[0] + 1 + 2 * BOUNDS[-1] + 1


def test_the_next_supervisor_counts_on_and_one_beside_it_has_a_slot_of_its_own(settings: Settings) -> None:
    def both() -> None:
        timer = taken(settings)
        timer.add(5)
        counted(settings, 5, 5)
        timer.add(5)

    counted(settings, 5)
    in_child(both)
    counted(settings, 5)
    found = call_times.read(settings, 7)
    assert found is not None and (found.count, found.total) == (6, 30)


def test_more_supervisors_than_slots_are_not_counted(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        timer = taken(settings)
        in_child(lambda: check(call_times.take(settings, 7) is None))
        timer.add(5)

    def check(holds: bool) -> None:
        assert holds

    monkeypatch.setattr(call_times, "_SLOTS", 1)
    in_child(work)
    in_child(lambda: taken(settings))  # it is free again


def test_what_another_version_wrote_is_not_read_and_is_begun_anew(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(settings, 5)
    monkeypatch.setattr(call_times, "BOUNDS", tuple(bound + 1 for bound in BOUNDS))
    assert call_times.read(settings, 7) == CallTimes()
    counted(settings, 6)
    found = call_times.read(settings, 7)
    assert found is not None and (found.count, found.total) == (1, 6)


def test_where_no_file_can_be_made_nothing_is_counted(settings: Settings) -> None:
    settings.run_dir.parent.mkdir(exist_ok=True)
    settings.run_dir.write_text("no folder")
    assert call_times.take(settings, 7) is None and call_times.read(settings, 7) is None


def test_the_file_is_the_owners_only_and_goes_with_the_container(settings: Settings) -> None:
    counted(settings, 5)
    [path] = (settings.run_dir / "call-times").iterdir()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    call_times.forget(settings, 7)
    call_times.forget(settings, 7)
    assert not path.exists()


def times(**counts: int) -> CallTimes:
    made = [0] * (len(BOUNDS) + 1)
    for name, count in counts.items():
        made[int(name[1:])] = count
    return CallTimes(tuple(made), 1000)


def test_what_came_since_and_what_has_begun_anew() -> None:
    assert times(b0=5, b2=3).since(times(b0=4)) == CallTimes(times(b0=1, b2=3).counts, 0)
    assert times(b0=1).since(times(b0=4)) == times(b0=1)


@pytest.mark.parametrize(
    ("share", "calls", "shown"),
    [
        (0.5, times(), "-"),
        (0.5, None, "-"),
        (0.5, times(b1=1), "<=20us"),
        (0.5, times(b0=50, b6=50), "<=10us"),
        (0.99, times(b0=50, b6=50), "<=1ms"),
        (0.99, times(b0=1, b12=99), "<=1s"),
        (0.99, times(b13=1), ">1s"),
    ],
)
def test_a_quantile_is_a_bound(share: float, calls: CallTimes | None, shown: str) -> None:
    assert quantile(calls, share) == shown


def test_bars_are_drawn_from_the_first_bucket_with_a_call_to_the_last() -> None:
    assert bars(times()) == bars(None) == []
    lines = bars(times(b1=400, b3=1))[2:]
    assert [line.split() for line in lines] == [["<=20us", "400", "#" * 40], ["<=50us", "0"], ["<=100us", "1", "#"]]


def test_a_record_has_seconds() -> None:
    found = record(times(b0=2, b13=1))
    assert (found["count"], found["seconds"]) == (3, 1e-6)
    assert found["buckets"][0] == {"at_most": 1e-5, "count": 2}
    assert found["buckets"][-1] == {"at_most": None, "count": 1}
