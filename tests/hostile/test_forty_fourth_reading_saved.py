"""What a forty-fourth reading found in what is saved: a container got the policy of the one whose name it had taken, a
passing error took what is saved away, and one that was free was said not to run, or to get a policy that it does not.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from graft.commands import ps, why_waiting
from graft.commands.restore import NOT_THERE, NOT_TRIED, restore
from graft.commands.sightings import Sightings
from graft.commands.watcher import Watcher
from graft.errors import KernelError
from graft.oci.plan import Plan
from graft.oci.saved_choice import saved_for
from graft.saved import store as store_module
from graft.saved.model import SavedState
from graft.saved.store import ATTACHMENTS, Store
from tests.e2e.conftest import WritePolicy, _docker, _podman, container_root, docker, podman, write_policy
from tests.e2e.test_saved_state import box, saver
from tests.hostile.test_fortieth_reading_records import DENIES, ENDS, HOOKS_OFF, kill
from tests.hostile.test_fortieth_reading_records import graft as graft_of
from tests.hostile.test_forty_first_reading_plane import CONTROL, FREE, start_again
from tests.hostile.test_forty_first_reading_plane import may_bind as may_bind_in
from tests.hostile.test_forty_first_reading_saved import policies
from tests.hostile.test_thirty_eighth_reading_engines import SLEEP, alone, found, may_bind, plain, saving
from tests.support.cgroups import attach_points
from tests.support.engines import Engine
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.puppet import puppet
from tests.support.shell import Result, Word, run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["_docker", "_podman", "box", "container_root", "docker", "found", "plain", "podman", "saver", "saving"]
__all__ += ["write_policy"]


# ---- a container that takes the name of another one that is saved ------------------------------------


def take_name(host: Host, engine: Engine, folder: Path) -> None:
    """web-new, which is denied all, becomes web, which was free and is gone. Nobody watches."""
    for name, policy in zip(("web", "web-new"), policies(folder, "free", "strict"), strict=True):
        engine.started(name, [], *SLEEP, network="host")
        host.graft("attach", "--cgroup", f"podman:{name}", "--policy", policy)
    alone(host)
    engine.remove("web")
    engine("rename", "web-new", "web")


@pytest.mark.parametrize("without", ["", "places of others"], ids=["", "control"])
@pytest.mark.parametrize("strangers", [0, 1], ids=["", "beside a stranger"])
def test_one_keeps_its_policy_when_it_has_the_name_of_another_one_and_starts_again(
    saving: Host, plain: Engine, tmp_path: Path, strangers: int, without: str
) -> None:
    take_name(saving, plain, tmp_path)
    if strangers:
        plain.started("other", [], *SLEEP, network="host")
        graft_of(saving, without, "up")  # it is attached: nothing is to be done but to note where it is
        alone(saving)
    plain("restart", "-t", "0", "web")
    done = graft_of(saving, without, "up")
    alone(saving)
    assert may_bind(saving, plain, "web") is bool(without)
    assert (
        "podman:web waits: the container that has its name now is saved as podman:web-new" in done.stderr
    ) is not bool(without)
    export = tmp_path / "export.yaml"
    export.write_text(saving.graft("export").stdout)
    graft_of(saving, without, "import", export, status=4 if without else 0)
    plain.remove("web", *["other"] * strangers)


@pytest.mark.parametrize("without", ["", "places of others"], ids=["", "control"])
def test_nor_is_it_noted_to_be_the_other_one_by_a_policy_for_now(
    saving: Host, plain: Engine, tmp_path: Path, without: str
) -> None:
    take_name(saving, plain, tmp_path)
    graft_of(saving, without, "attach", "--no-save", "--cgroup", "podman:web", "--deny")
    alone(saving)
    places = {one.last.cgroup for one in Store(saving.settings).read()[0].attachments}
    assert len(places) == (1 if without else 2)
    plain.remove("web")


def test_one_that_is_made_again_by_that_name_has_what_is_saved(saving: Host, plain: Engine, tmp_path: Path) -> None:
    take_name(saving, plain, tmp_path)
    saving.graft("up")
    alone(saving)
    plain.remove("web")
    for name in ("web", "web-new"):
        plain.started(name, [], *SLEEP, network="host")
    assert saving.graft("up").stderr == ""
    alone(saving)
    assert may_bind(saving, plain, "web") and not may_bind(saving, plain, "web-new")
    plain.remove("web", "web-new")


# ---- a file that cannot be used now -------------------------------------------------------------------

FAILS = """
import errno
from graft.saved import store
read = store._read
def fails(path):
    if path.parent.name == "attachments":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return read(path)
store._read = fails
"""
"""The disk gives an error for each saved attachment."""

NEWER = """
from graft.saved import envelope
envelope.encode.__defaults__ = (2,)
decode = envelope.decode
def either(raw, source):
    envelope.VERSION = 2 if raw.startswith(b"graft-saved 2 ") else 1
    return decode(raw, source)
envelope.decode = either
"""
"""A later version, which writes another form and reads both."""


def io_error(path: Path, read: Callable[[Path], bytes] = store_module._read) -> bytes:
    """The same for what is read in the test's process."""
    if path.parent.name == ATTACHMENTS:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return read(path)


STAYS = pytest.mark.parametrize("without", ["", "what stays"], ids=["", "control"])


def changed(host: Host, change: str, without: str, *words: Word, status: int = 0) -> Result:
    """Run a command that is changed so."""
    return run([sys.executable, "-c", ENDS % change, without, *words], environment=host.environment, status=status)


@STAYS
def test_an_error_of_the_disk_takes_nothing_away(
    saver: Host, box: Path, write_policy: WritePolicy, without: str
) -> None:
    store = start_again(saver, box, write_policy(DENIES))
    done = changed(saver, FAILS, without, "up")
    [file] = [*store.folder.glob("attachments/*"), *saver.settings.state_dir.glob("set-aside/*")]
    assert f"{store.folder / ATTACHMENTS}" in done.stderr and "cannot be read: Input/output error" in done.stderr
    assert (file.parent.name == "set-aside") is bool(without)
    if without:
        assert saver.graft("up").stderr == "" and saver.ps() == []
    else:
        until("the watcher has tried again", lambda: bool(attach_points(box)))
    assert may_bind_in(saver, box) is bool(without)


def test_ps_tells_of_it_and_does_not_say_that_none_runs(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    start_again(saver, box, write_policy(DENIES))
    with pytest.MonkeyPatch.context() as patch, saver.installation as graft:
        patch.setattr(store_module, "_read", io_error)
        assert "Input/output error; not restored" in restore(graft).problems[0]
    assert [one["waits"] for one in saver.ps()] == ["not all that is saved can be read now"]
    assert "not restored: " in changed(saver, FAILS, "", "ps").stderr


@CONTROL
def test_what_cannot_be_read_a_second_time_was_not_detached(
    saver: Host, box: Path, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch, is_control: bool
) -> None:
    store = start_again(saver, box, write_policy(DENIES))
    all_of_it = store.read()
    monkeypatch.setattr(Store, "read", lambda self: all_of_it)
    monkeypatch.setattr(store_module, "_read", io_error)
    if is_control:
        monkeypatch.setattr(Store, "attachment", lambda self, target: None)
    with saver.installation as graft:
        waits = restore(graft).waiting.values()
    assert is_control or "cannot be read: Input/output error" in " ".join(waits)
    assert bool(waits) is not is_control and not attach_points(box)


@STAYS
def test_an_older_version_leaves_what_a_newer_one_has_saved(
    saver: Host, box: Path, write_policy: WritePolicy, without: str
) -> None:
    attach: list[Word] = ["attach", "--cgroup", box, "--policy", write_policy(DENIES)]
    changed(saver, NEWER, "", *attach)
    alone(saver)
    if not without:  # as its watcher does
        with saver.installation as graft:
            assert "of version 2" in restore(graft, Sightings()).problems[0]
    assert "of version 2" in graft_of(saver, without, "up").stderr
    alone(saver)
    assert ("of version 2" in saver.graft("ps").stderr) is not bool(without)
    box.rmdir()
    box.mkdir()
    changed(saver, NEWER, "", "up")
    assert may_bind_in(saver, box) is bool(without)


def test_what_is_damaged_stays_until_an_operator_sees_that(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    store = start_again(saver, box, write_policy(DENIES))
    [file] = store.folder.glob("attachments/*")
    file.write_bytes(file.read_bytes()[:-9])
    with saver.installation as graft:
        assert "damaged" in restore(graft, Sightings()).problems[0]
    assert file.exists() and "damaged" in saver.graft("ps").stderr
    assert "set aside as" in saver.graft("up").stderr and not file.exists()


@STAYS
def test_an_import_replaces_nothing_that_it_cannot_read(
    saver: Host, box: Path, tmp_path: Path, write_policy: WritePolicy, without: str
) -> None:
    changed(saver, NEWER, "", "attach", "--cgroup", box, "--policy", write_policy(DENIES))
    (tmp_path / "none.yaml").write_text("version: 1\n")
    done = graft_of(saver, without, "import", tmp_path / "none.yaml", status=0 if without else 6)
    assert ("of version 2" in done.stderr) is not bool(without)
    assert any((saver.settings.state_dir / "saved" / ATTACHMENTS).iterdir()) is not bool(without)


@CONTROL
def test_one_that_asks_does_not_start_where_what_is_saved_for_it_cannot_be_read(
    saver: Host, box: Path, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch, is_control: bool
) -> None:
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(DENIES))
    monkeypatch.setattr(store_module, "_read", io_error)
    if is_control:
        monkeypatch.setattr(Store, "read", lambda self: (SavedState(), []))
    plan = cast(Plan, SimpleNamespace(settings=saver.settings, id=64 * "a"))
    refused = nullcontext() if is_control else pytest.raises(KernelError, match="it may be what is saved")
    with refused, saved_for(plan, box) as found:
        assert found is None, "the control: it starts by what it asks for"


# ---- a detach that was killed, and what runs without its policy ---------------------------------------


def test_one_whose_detach_was_killed_is_attached_again(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(DENIES))
    with puppet(box, saver.netns.path) as program:  # it runs all the time
        kill(saver, HOOKS_OFF, "", "detach", "--cgroup", box)
        assert program.bind(HOST4, saver.port()) == "ok"
        saver.graft("ps")
        until("the watcher attaches it", lambda: bool(program.bind(HOST4, saver.port()) == "EACCES"))


@pytest.mark.parametrize("without", ["", "undone told"], ids=["", "control"])
def test_the_watcher_is_told_of_it(saver: Host, box: Path, write_policy: WritePolicy, without: str) -> None:
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(DENIES))
    alone(saver)
    watcher = Watcher(saver.settings, keep=True)
    watcher._watch()
    kill(saver, HOOKS_OFF, "", "detach", "--cgroup", box)
    assert not watcher._has_changed()
    graft_of(saver, without, "ps")
    assert watcher._has_changed() is not bool(without)
    assert watcher._folders.fd is not None
    os.close(watcher._folders.fd)


@CONTROL
def test_ps_looks_whether_it_runs(
    saver: Host, box: Path, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch, is_control: bool
) -> None:
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(DENIES))
    alone(saver)
    kill(saver, HOOKS_OFF, "", "detach", "--cgroup", box)
    why_waiting.note(saver.settings, {})  # which nobody has, where nobody restored in the moment before
    if is_control:
        monkeypatch.setattr(ps, "look_for", lambda *_: ({}, {}))
    with saver.installation as graft:
        graft.reap()
        assert [one.why for one in ps.waiting(graft)] == [NOT_THERE if is_control else NOT_TRIED]
        box.rmdir()
        assert [one.why for one in ps.waiting(graft)] == [NOT_THERE]


# ---- a policy for one that is detached for now -------------------------------------------------------


@pytest.mark.parametrize("without", ["", "detached told"], ids=["", "control"])
def test_it_is_said_that_one_is_detached_and_gets_its_policy_after_the_next_boot(
    saver: Host, box: Path, write_policy: WritePolicy, without: str
) -> None:
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(FREE))
    saver.graft("detach", "--no-save", "--cgroup", box)
    apply: list[Word] = ["policy", "apply", write_policy("name: free\ndefault: deny\n")]
    for words in ([*apply, "--cgroup", box], apply):
        done = graft_of(saver, without, *words)
        assert ("after the next boot: it is detached for now" in done.stdout) is not bool(without)
        assert ("when it is there" in done.stdout) is bool(without)
    saver.graft("up")
    assert may_bind_in(saver, box) and saver.ps() == []
    saver.graft("down", "--force")
    saver.graft("up")
    assert not may_bind_in(saver, box)
