"""Where a saved container is looked for, and when it is said not to be there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.commands import container_search, restore
from graft.commands.container_search import container_folders
from graft.commands.restore import NOT_THERE, Restored
from graft.errors import KernelError, NotFoundError
from graft.kernel import cgroup
from graft.saved.model import LastSeen, SavedAttachment, Target
from graft.state.engines import FoundContainer, NoAnswerError
from tests.support.saved import EVERY_RULE

ID = "ab" * 32
STRANGER = "db" * 32

Answer = Callable[[str], FoundContainer]


class NoContainers:
    """An installation to which nothing is attached."""

    class containers:
        @staticmethod
        def listing() -> list[object]:
            return []


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the v2 tree, with nothing of an engine's in it."""
    monkeypatch.setattr(cgroup, "v2_mount", lambda: tmp_path)
    monkeypatch.setattr(container_search, "_FOLDER_SECONDS", 30)
    return tmp_path


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Has every look into a folder hang."""

    def hold_folder(folder: Path) -> None:
        monkeypatch.setattr(container_search, "_FOLDER_SECONDS", 2)
        for module, name in ((os, "scandir"), (os.path, "isdir")):
            look = getattr(module, name)

            def held(path: Any, look: Callable[[Any], Any] = look) -> Any:
                while Path(path) == folder or folder in Path(path).parents:
                    time.sleep(1)
                return look(path)

            monkeypatch.setattr(module, name, held)

    return hold_folder


def saved(kind: str, name: str, last: LastSeen | None = None) -> SavedAttachment:
    return SavedAttachment(Target(kind, name), EVERY_RULE, last=last or LastSeen())


def find(one: SavedAttachment) -> FoundContainer | None:
    return restore._Finder(NoContainers(), [one]).find(one)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["docker", "podman"])
def test_a_stranger_whose_id_begins_as_a_saved_name_is_not_the_container(
    tree: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = tree / "docker" / STRANGER
    place.mkdir(parents=True)
    monkeypatch.setattr(restore, "resolve", lambda _: FoundContainer(place, kind, "stranger", STRANGER, 1))
    assert find(saved(kind, "db")) is None
    monkeypatch.setattr(restore, "resolve", lambda _: FoundContainer(place, kind, "db", STRANGER, 1))
    assert find(saved(kind, "db")) is not None


def not_running(_: str) -> FoundContainer:
    raise NotFoundError("docker: no such container")


def test_a_container_in_a_folder_that_is_held_is_asked_for_and_tried_again(
    tree: Path, monkeypatch: pytest.MonkeyPatch, hold: Callable[[Path], None]
) -> None:
    (tree / "machine.slice").mkdir()
    hold(tree / "machine.slice")
    monkeypatch.setattr(restore, "resolve", not_running)
    with pytest.raises(KernelError, match=r"somebody holds .*machine\.slice"):
        find(saved("docker", "web"))
    place = tree / "machine.slice" / f"libpod-{ID}.scope"
    monkeypatch.setattr(restore, "resolve", lambda _: FoundContainer(place, "docker", "web", ID, 1))
    assert find(saved("docker", "web")) == FoundContainer(place, "docker", "web", ID, 1)


@pytest.mark.parametrize(
    ("error", "silent", "asked"),
    [
        (KernelError("podman: cannot read the output"), True, ["a", "b"]),
        (NoAnswerError("podman did not answer"), False, ["a", "b"]),
        (NoAnswerError("podman did not answer"), True, ["a"]),
    ],
)
def test_an_engine_is_asked_for_the_others_unless_it_is_silent(
    tree: Path, monkeypatch: pytest.MonkeyPatch, error: KernelError, silent: bool, asked: list[str]
) -> None:
    (tree / "libpod_parent" / f"libpod-{ID}").mkdir(parents=True)
    seen = []

    def resolve(text: str) -> FoundContainer:
        seen.append(text.removeprefix("podman:"))
        raise error

    monkeypatch.setattr(restore, "resolve", resolve)
    monkeypatch.setattr(restore, "is_silent", lambda _: silent)
    both = [saved("podman", name) for name in ("a", "b")]
    finder = restore._Finder(NoContainers(), both)  # type: ignore[arg-type]
    for one in both:
        with pytest.raises(KernelError) as raised:
            finder.find(one)
        assert raised.value.message == error.message
    assert seen == asked


def test_what_is_in_another_folder_is_seen_while_one_is_held(tree: Path, hold: Callable[[Path], None]) -> None:
    (tree / "docker" / ID).mkdir(parents=True)
    (tree / "machine.slice").mkdir()
    hold(tree / "machine.slice")
    assert container_folders(tree) == ([ID], ["machine.slice"])


def test_whether_a_folder_of_its_own_that_is_held_is_there_is_not_known(
    tree: Path, hold: Callable[[Path], None]
) -> None:
    one = saved("cgroup", "boxes/one")
    assert find(one) is None
    hold(tree / "boxes")
    with pytest.raises(KernelError, match="somebody holds"):
        find(one)


@pytest.mark.parametrize("place", [ID, f"apps/{ID}", f"libpod_parent/{STRANGER}/libpod-{ID}", f"a/b/c/x-{ID}.scope"])
def test_a_container_is_seen_wherever_its_engine_has_made_it(tree: Path, place: str) -> None:
    (tree / place).mkdir(parents=True)
    (tree / "apps.slice").mkdir()
    names, held = container_folders(tree)
    assert set(names) - {STRANGER} == {Path(place).name} and not held


def test_what_is_below_a_held_folder_keeps_no_cgroup_above_from_being_found(
    tree: Path, hold: Callable[[Path], None]
) -> None:
    (tree / "apps" / "inner").mkdir(parents=True)
    hold(tree / "apps" / "inner")
    assert container_folders(tree) == ([], ["apps"])
    assert find(saved("cgroup", "apps")) is not None


def test_only_that_a_container_does_not_run_is_not_tried_again() -> None:
    assert not Restored(waiting={"cgroup:box": NOT_THERE, "unit:web.service": NOT_THERE}).may_succeed_later
    assert Restored(waiting={"docker:web": NOT_THERE}).may_succeed_later, "its engine may make it anywhere"
    assert Restored(waiting={"docker:web": "somebody holds a folder"}).may_succeed_later
