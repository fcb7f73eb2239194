"""The watcher: which folders it watches for what is saved, and which changes in them matter."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from graft.commands.watcher import Interest, interests, nearest
from graft.kernel import inotify
from graft.saved.model import LastSeen, SavedAttachment, SavedState, Target
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
