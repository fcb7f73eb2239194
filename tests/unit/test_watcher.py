"""The watcher: which folders it watches for what is saved, and which changes in them matter."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from graft.commands import watcher, watcher_process
from graft.commands.sightings import Sightings
from graft.commands.watched_folders import Interest, WatchedFolders, interests, nearest
from graft.commands.watcher import TRIES
from graft.keeper import lines
from graft.kernel import cgroup, inotify
from graft.model.settings import Settings
from graft.saved.model import LastSeen, SavedAttachment, SavedState, Target
from graft.state import helper_process
from tests.support.saved import EVERY_RULE

ID = "ab" * 32


def saved(kind: str, name: str, cgroup: str = "") -> SavedAttachment:
    return SavedAttachment(Target(kind, name), EVERY_RULE, last=LastSeen(cgroup, ID if cgroup else ""))


def test_the_deepest_folder_that_exists_is_watched_for_the_next_name(tmp_path: Path) -> None:
    assert nearest(tmp_path, "a/b/c") == (tmp_path, "a")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert nearest(tmp_path, "a/b/c") == (tmp_path / "a" / "b", "c")
    (tmp_path / "a" / "b" / "c").mkdir()
    assert nearest(tmp_path, "a/b/c") == (tmp_path / "a" / "b", "c"), "its removal is seen there"


def test_a_container_of_an_engine_is_expected_where_engines_make_them(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    found = interests(tmp_path, SavedState((), (saved("docker", "web", f"docker/{ID}"),)))
    assert found[tmp_path].matches("machine.slice") and not found[tmp_path].matches("user.slice")
    assert found[tmp_path / "docker"].matches("cd" * 32), "a new one of that name has another id"
    assert found[tmp_path / "docker"].matches(f"docker-{'cd' * 32}.scope")
    assert not found[tmp_path / "docker"].matches("buildkit")


@pytest.mark.parametrize(
    ("last", "pod"),
    [
        (f"libpod_parent/libpod-{ID}", f"libpod_parent/{'cd' * 32}"),
        (f"machine.slice/libpod-{ID}.scope", f"machine.slice/machine-libpod_pod_{'cd' * 32}.slice"),
        (f"apps/{'ef' * 32}/libpod-{ID}", f"apps/{'cd' * 32}"),
    ],
)
def test_a_container_of_podmans_is_expected_in_a_pod_that_is_made_anew(tmp_path: Path, last: str, pod: str) -> None:
    (tmp_path / pod).parent.mkdir()
    state = SavedState((), (saved("podman", "web", last),))
    assert interests(tmp_path, state)[(tmp_path / pod).parent].matches(Path(pod).name)
    (tmp_path / pod).mkdir()
    assert interests(tmp_path, state)[tmp_path / pod].matches(f"libpod-{'ab' * 32}")


def test_a_unit_and_a_path_are_expected_at_their_own_names(tmp_path: Path) -> None:
    (tmp_path / "system.slice").mkdir()
    state = SavedState((), (saved("unit", "web.service"), saved("cgroup", "own/box")))
    found = interests(tmp_path, state)
    assert found == {
        tmp_path / "system.slice": Interest(frozenset({"web.service"})),
        tmp_path: Interest(frozenset({"own"})),
    }


def test_what_is_not_saved_is_not_watched(tmp_path: Path) -> None:
    assert interests(tmp_path, SavedState()) == {}


def test_the_kernel_reports_folders_that_are_made_and_removed(tmp_path: Path) -> None:
    fd = inotify.open_inotify()
    try:
        watch = inotify.watch_folder(fd, str(tmp_path))
        assert inotify.watch_folder(fd, str(tmp_path)) == watch
        assert inotify.read_events(fd) == []
        (tmp_path / "box").mkdir()
        (tmp_path / "box").rmdir()
        made, removed = inotify.read_events(fd)
        assert (made.watch, made.name, removed.name) == (watch, "box", "box")
        assert made.mask & inotify.CREATE and removed.mask & inotify.DELETE
    finally:
        os.close(fd)


def test_an_attachment_that_was_seen_nowhere_is_watched_for_by_its_name(tmp_path: Path) -> None:
    one = replace(saved("cgroup", "box"), last=LastSeen())
    assert interests(tmp_path, SavedState((), (one,))) == {tmp_path: Interest(frozenset({"box"}))}


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[WatchedFolders]:
    (tmp_path / "own").mkdir()
    one = WatchedFolders(tmp_path, {tmp_path / "own": Interest(everything=True)})
    yield one
    if one.fd is not None:
        os.close(one.fd)


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    def refused(*_: object) -> int:
        raise OSError(code, f"{call}: {os.strerror(code)}")

    monkeypatch.setattr(inotify, call, refused)


BOX = SavedState((), (saved("cgroup", "box"),))


@pytest.mark.parametrize(
    ("call", "code"),
    [("watch_folder", errno.ENOSPC), ("watch_folder", errno.ENOMEM), ("open_inotify", errno.EMFILE)],
)
def test_a_folder_that_the_kernel_does_not_watch_is_looked_at(
    tmp_path: Path, folders: WatchedFolders, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    with monkeypatch.context() as refusing:
        refuse(refusing, call, code)
        folders.watch(BOX)
        assert folders.problems == dict.fromkeys(map(str, (tmp_path, tmp_path / "own")), f"{call}: {os.strerror(code)}")
        assert not folders.watch(BOX)
        (tmp_path / "other").mkdir()
        assert not folders.watch(BOX)
        (tmp_path / "box").mkdir()
        assert folders.watch(BOX) and not folders.watch(BOX)
        (tmp_path / "box").rename(tmp_path / "box2")  # removed, it might leave its inode to the next one
        (tmp_path / "box").mkdir()
        assert folders.watch(BOX), "it is another one"
        (tmp_path / "own" / "file").touch()
        assert folders.watch(BOX)
    assert folders.watch(BOX), "what was made since the last look"
    assert folders.problems == {}
    (tmp_path / "box").rmdir()
    assert folders.have_changed()


def test_a_folder_that_is_not_there_is_no_problem(tmp_path: Path) -> None:
    one = WatchedFolders(tmp_path, {tmp_path / "none": Interest(everything=True)})
    one.watch(BOX)
    assert one.problems == {} and one.fd is not None
    os.close(one.fd)


def test_a_name_that_is_too_long_for_a_folder_is_looked_for_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert nearest(tmp_path, f"a/{'x' * 300}/b") == (tmp_path / "a", "x" * 300)


@pytest.fixture
def watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> watcher.Watcher:
    """A watcher of an installation that has nothing saved."""
    settings = Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path), "GRAFT_STATE_DIR": str(tmp_path / "state")})
    monkeypatch.setattr(cgroup, "v2_mount", lambda: tmp_path)
    monkeypatch.setattr(watcher_process, "is_running", lambda _: True)
    return watcher.Watcher(settings, keep=True)


@pytest.mark.parametrize("error", [BlockingIOError(errno.EAGAIN, "no process"), MemoryError(), ValueError("x")])
def test_an_error_does_not_end_it(
    watching: watcher.Watcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as failing:
        failing.setattr(helper_process, "run_each", fail)
        watching._watch()
        failing.setattr(watcher, "restore", fail)
        failing.setattr(watcher, "Installation", nullcontext)
        watching._try()
    assert capfd.readouterr().err.count(str(error) or type(error).__name__) == 2
    [line] = watcher_process.warnings(watching._settings)
    assert "is only looked at every 3 s" in line
    assert watching._timeout() is not None, "it looks again"
    watching._watch()
    assert watcher_process.warnings(watching._settings) == []


def test_a_log_that_cannot_be_written_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(lines, "_STANDARD_ERROR", full.fileno())
        watcher.Log()("a line")


def test_a_watcher_that_cannot_be_started_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path)})
    monkeypatch.setattr(watcher_process, "MODULE", "graft.no_such_module")
    assert not watcher_process.ensure_running(settings)
    [line] = watcher_process.warnings(settings)
    assert "nobody watches" in line
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: os.stat("/none"))
    assert not watcher_process.ensure_running(settings)


def test_many_changes_make_few_tries_due_and_put_none_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    schedule, most, tries = watcher.Schedule(), 0, []
    schedule.start()
    for _ in range(20_000):  # one each millisecond
        now += 0.001
        schedule.start()
        most = max(most, len(schedule.due))
        if schedule.take_due():
            tries.append(now)
    assert most < 100
    assert max(later - earlier for earlier, later in pairwise(tries)) < 0.01
    last = now
    while schedule.due:
        now = max(now, min(schedule.due))
        schedule.take_due()
    assert now - last >= TRIES[-1] - 0.25, "what changed last is tried as late as if nothing had changed before"


def test_a_change_does_not_put_off_the_late_tries_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    schedule = watcher.Schedule()
    schedule.start()
    now += 1.5
    schedule.take_due()
    schedule.start()
    assert {1000.0 + delay for delay in TRIES[5:]} <= set(schedule.due)


def test_a_container_settles_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    seen = Sightings()
    assert not seen.is_settled("web", 7)
    now += 3
    assert not seen.is_settled("db", 8), "another one appears"
    now += 1
    assert seen.is_settled("web", 7) and not seen.is_settled("db", 8)
    assert not seen.is_settled("web", 9), "it was made anew"
    now += 4
    seen.forget_others({"db"})
    assert seen.is_settled("db", 8) and not seen.is_settled("web", 9)


def test_a_watcher_that_is_at_one_work_for_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path)})
    with watcher_process.watcher_lock(settings) as lock:
        lock.note(True)
        assert watcher_process.warnings(settings) == [] and watcher_process.ensure_running(settings)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 70)
        [line] = watcher_process.warnings(settings)
        assert f"(process {os.getpid()}) has waited for something for" in line
        assert not watcher_process.ensure_running(settings)
        lock.note(False)
        assert watcher_process.warnings(settings) == [] and watcher_process.ensure_running(settings)
