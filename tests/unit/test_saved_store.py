"""The files of what is saved: whole or not at all, root's alone, and each by itself."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from graft.commands import saving
from graft.errors import ConflictError, KernelError, RefusedError
from graft.kernel import atomic_file
from graft.model.endpoint import parse_endpoint
from graft.model.settings import Settings
from graft.policy.model import policy_from_flags
from graft.saved import envelope
from graft.saved import store as store_module
from graft.saved.model import SavedState, saved_state
from graft.saved.store import Store, file_name
from tests.support.saved import ATTACHMENT, ENDPOINT

OTHER = parse_endpoint("other", "127.0.0.1:dynamic")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folders = {"GRAFT_STATE_DIR": str(tmp_path / "state"), "GRAFT_RUN_DIR": str(tmp_path / "run")}
    return Settings.from_environment(folders)


@pytest.fixture
def store(settings: Settings) -> Store:
    made = Store(settings)
    with made.locked():
        for prepared in (made.prepare_endpoint(ENDPOINT), made.prepare_endpoint(OTHER)):
            prepared.commit()
        made.prepare_attachment(ATTACHMENT).commit()
    return made


def whole() -> SavedState:
    return saved_state([ENDPOINT, OTHER], [ATTACHMENT])


def test_everything_is_roots_alone(store: Store, tmp_path: Path) -> None:
    assert store.read() == (whole(), [])
    for path in (tmp_path / "state", *(tmp_path / "state").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("mode", [0o602, 0o620])
def test_a_file_that_others_can_write_is_not_read(store: Store, mode: int) -> None:
    path = store.folder / "endpoints" / "nx4"
    path.chmod(mode)
    state, [bad] = store.read()
    assert (state.endpoints, bad.path, bad.reason) == ((OTHER,), path, "others can write it")


@pytest.mark.parametrize("where", ["", "saved", "saved/endpoints"])
def test_of_a_folder_that_others_can_write_nothing_is_read_or_written(store: Store, tmp_path: Path, where: str) -> None:
    (tmp_path / "state" / where).chmod(0o770)
    with pytest.raises(RefusedError, match="others can write it"):
        store.read()
    with pytest.raises(RefusedError, match="others can write it"):
        store.prepare_endpoint(OTHER)


def test_a_link_in_the_place_of_a_file_or_folder_is_not_followed(store: Store, tmp_path: Path) -> None:
    path = store.folder / "endpoints" / "nx4"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    state, [bad] = store.read()
    assert state.endpoints == (OTHER,) and "Too many levels of symbolic links" in bad.reason
    (store.folder / "endpoints").rename(tmp_path / "folder")
    (store.folder / "endpoints").symlink_to(tmp_path / "folder")
    with pytest.raises(RefusedError, match="symbolic link"):
        store.read()


def test_what_cannot_be_used_is_set_aside_and_the_rest_is_read(store: Store, tmp_path: Path) -> None:
    damaged, newer = store.folder / "endpoints" / "nx4", store.folder / "attachments" / file_name(ATTACHMENT.target)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    newer.write_bytes(envelope.encode({"container": "docker:web"}, version=7))
    for path in (damaged, newer):
        path.chmod(0o600)
    state, bad = store.read()
    assert state == saved_state([OTHER], [])
    assert [one.stays for one in bad] == [False, True]
    lines = [store.set_aside(one) for one in bad]
    aside = tmp_path / "state" / "set-aside"
    assert lines == [
        f"{damaged}: damaged: the checksum is wrong; set aside as {aside}/endpoints-nx4.1",
        f"{newer}: of version 7, which this Graft cannot read (it writes 1); set aside as"
        f" {aside}/attachments-{newer.name}.1",
    ]
    assert store.read() == (state, [])
    assert len(list(aside.iterdir())) == 2


def test_a_file_under_another_name_is_not_used(store: Store) -> None:
    (store.folder / "endpoints" / "nx4").rename(store.folder / "endpoints" / "nx5")
    state, [bad] = store.read()
    assert state.endpoints == (OTHER,) and bad.reason == "it is that of another endpoint, nx4"


def test_a_write_that_was_killed_in_the_middle_is_ignored_and_removed(store: Store) -> None:
    left = store.folder / "endpoints" / ".nx4.12345"
    left.write_bytes(b"graft-saved 1 half of")
    assert store.read() == (whole(), [])
    with store.locked():
        store.tidy()
    assert not left.exists() and store.read() == (whole(), [])


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_nothing_is_changed(store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _full)
    changed = parse_endpoint("nx4", "0.0.0.0:1")
    with (
        pytest.raises(KernelError, match="No space left on device; nothing was changed"),
        saving.endpoint(settings, changed, True),
    ):
        pytest.fail("the change was made")
    with pytest.raises(KernelError, match="No space left on device"):
        store.prepare_all(SavedState())
    monkeypatch.undo()
    assert store.read() == (whole(), [])
    assert not [path for path in store.folder.parent.rglob("*") if path.name.startswith(".") or "new" in path.name]


def test_a_change_that_fails_leaves_what_was_saved(store: Store, settings: Settings) -> None:
    with pytest.raises(ConflictError), saving.endpoint(settings, parse_endpoint("nx4", "0.0.0.0:1"), True):
        raise ConflictError("in use")
    assert store.read() == (whole(), [])


def test_a_change_that_is_made_and_cannot_be_put_in_place_says_so(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", _full)
    with (
        pytest.raises(KernelError, match="the change is in force, but was not saved: No space left"),
        saving.endpoint(settings, OTHER, True),
    ):
        pass


@pytest.mark.parametrize("in_one_step", [True, False])
def test_the_whole_is_replaced_in_one_step_or_three(
    store: Store, monkeypatch: pytest.MonkeyPatch, in_one_step: bool
) -> None:
    if not in_one_step:

        def refuse(*_: object) -> None:
            raise OSError(errno.EINVAL, "overlay")

        monkeypatch.setattr(atomic_file, "syscall", refuse)
    prepared = store.prepare_all(saved_state([ENDPOINT], []))
    assert store.read() == (whole(), [])
    store.put_in_place(prepared)
    assert store.read() == (saved_state([ENDPOINT], []), [])
    prepared.undo()
    assert store.read() == (whole(), [])
    assert sorted(path.name for path in store.folder.parent.iterdir()) == ["saved", "saved.lock"]
    prepared = store.prepare_all(saved_state([ENDPOINT], []))
    store.put_in_place(prepared)
    prepared.finish()
    assert store.read() == (saved_state([ENDPOINT], []), [])
    assert sorted(path.name for path in store.folder.parent.iterdir()) == ["saved", "saved.lock"]


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_replacement_that_ends_after_any_of_its_steps_leaves_all_as_it_was(
    store: Store, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    rename, made = Path.rename, list[Path]()

    def end(path: Path, target: Path) -> Path:
        if len(made) == steps:
            made.append(path)
            raise KeyboardInterrupt
        made.append(path)
        return rename(path, target)

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "overlay")

    monkeypatch.setattr(atomic_file, "syscall", refuse)
    store.prepare_for_now(ATTACHMENT, policy_from_flags("narrow", [], [], True)).commit()
    prepared = store.prepare_all(SavedState())
    monkeypatch.setattr(Path, "rename", end)
    with pytest.raises(KeyboardInterrupt):
        store.put_in_place(prepared)
    assert store.read() == (whole(), [])
    assert store.wanted(ATTACHMENT).policy.name == "narrow"
    assert sorted(path.name for path in store.folder.parent.iterdir()) == ["saved", "saved.lock"]


def test_what_is_for_now_ends_with_what_was_saved_also_where_the_command_is_killed_then(store: Store) -> None:
    store.prepare_for_now(ATTACHMENT, policy_from_flags("narrow", [], [], True)).commit()
    prepared = store.prepare_all(whole())
    store.put_in_place(prepared)
    assert store.wanted(ATTACHMENT) == ATTACHMENT
    store.prepare_all(whole()).undo()
    assert store.wanted(ATTACHMENT) == ATTACHMENT, "not what the killed one has put away"


def test_a_replacement_that_was_killed_between_its_steps_is_finished(store: Store) -> None:
    store.prepare_all(saved_state([ENDPOINT], []))
    store.folder.rename(store.folder.with_name("saved.old"))
    with store.locked():
        store.tidy()
    assert store.read() == (whole(), []), "the old state, whole"
    assert sorted(path.name for path in store.folder.parent.iterdir()) == ["saved", "saved.lock"]


def test_of_two_names_for_one_cgroup_the_later_is_kept(store: Store, settings: Settings) -> None:
    from dataclasses import replace

    from graft.saved.model import Target

    renamed = replace(ATTACHMENT, target=Target("cgroup", ATTACHMENT.last.cgroup))
    with saving.alone(settings, True), saving.attachment(settings, renamed, True):
        pass
    assert store.read()[0].attachments == (renamed,)


def test_who_waits_for_the_lock_too_long_is_told_who_holds_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_LOCK_SECONDS", 0.05)
    with (
        store.locked(),
        pytest.raises(KernelError, match=rf"process {os.getpid()} holds .*/saved.lock"),
        store.locked(),
    ):
        pass
    with store.locked():
        pass


def test_a_policy_for_now_is_roots_alone_and_is_what_is_wanted_until_it_is_dropped(
    store: Store, tmp_path: Path
) -> None:
    narrow = policy_from_flags("narrow", [], [], True)
    assert store.wanted(ATTACHMENT) == ATTACHMENT
    store.prepare_for_now(ATTACHMENT, narrow).discard()
    assert store.wanted(ATTACHMENT) == ATTACHMENT
    store.prepare_for_now(ATTACHMENT, narrow).commit()
    wanted = store.wanted(ATTACHMENT)
    assert wanted.policy == narrow
    assert (wanted.target, wanted.last) == (ATTACHMENT.target, ATTACHMENT.last)
    assert store.read() == (whole(), []), "what is saved stays"
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    store.drop_for_now(ATTACHMENT.target)
    store.drop_for_now(ATTACHMENT.target)
    assert store.wanted(ATTACHMENT) == ATTACHMENT
    store.prepare_for_now(ATTACHMENT, narrow).commit()
    store.resume_all()
    assert store.wanted(ATTACHMENT) == ATTACHMENT


def test_where_a_policy_for_now_cannot_be_read_the_saved_one_is_not_taken(store: Store, tmp_path: Path) -> None:
    store.prepare_for_now(ATTACHMENT, policy_from_flags("narrow", [], [], True)).commit()
    [note] = (tmp_path / "run").rglob(file_name(ATTACHMENT.target))
    note.write_text("{}")
    with pytest.raises(KernelError, match="cannot read"):
        store.wanted(ATTACHMENT)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_policy_for_now_is_another_one_during_a_change_and_as_it_was_where_that_fails(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool
) -> None:
    if not in_one_step:
        monkeypatch.setattr(atomic_file, "syscall", _not_in_one_step)
    before, after = (policy_from_flags(name, [], [], True) for name in ("before", "after"))
    with store.for_now_changed(ATTACHMENT, after):
        assert store.wanted(ATTACHMENT) == ATTACHMENT, "there is no note"
    store.prepare_for_now(ATTACHMENT, before).commit()
    with pytest.raises(KeyboardInterrupt), store.for_now_changed(ATTACHMENT, after):
        assert store.wanted(ATTACHMENT).policy == after
        raise KeyboardInterrupt
    assert store.wanted(ATTACHMENT).policy == before
    with pytest.raises(KeyboardInterrupt), store.for_now_changed(ATTACHMENT, after):
        store.resume_all()
        raise KeyboardInterrupt
    store.prepare_for_now(ATTACHMENT, before).commit()
    with store.for_now_changed(ATTACHMENT, after):
        pass
    assert store.wanted(ATTACHMENT).policy == after
    assert [path.name for path in (tmp_path / "run/paused/policies").iterdir()] == [file_name(ATTACHMENT.target)]


def _not_in_one_step(*_: object) -> None:
    raise OSError(errno.EINVAL, "overlay")


def test_forgetting_leaves_nothing_but_the_lock(store: Store) -> None:
    store.forget_all()
    assert [path.name for path in store.folder.parent.iterdir()] == ["saved.lock"]
    assert store.read() == (SavedState(), [])
