"""What a forty-first reading found in what is saved: a command about a container reached the policy of the one that has
its name now; an import that was killed, or had lost maps before it, left a wider policy than it said.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graft.commands import renew, watcher_process
from graft.kernel import cgroup
from graft.saved.store import Store
from tests.e2e.conftest import _docker, _podman, container_root, docker, podman, write_policy
from tests.e2e.test_saved_state import box, saver, watcher_of
from tests.hostile.test_fortieth_reading_records import graft, kill
from tests.hostile.test_thirty_eighth_reading_engines import SLEEP, alone, found, may_bind, plain, saving
from tests.hostile.test_thirty_eighth_reading_saved import answer, lost_program
from tests.hostile.test_thirty_sixth_reading_saved import wide
from tests.support.engines import Engine
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.program import Program
from tests.support.puppet import puppet
from tests.support.shell import Word

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["_docker", "_podman", "box", "container_root", "docker", "found", "lost_program", "plain", "podman", "saver"]
__all__ += ["saving", "wide", "write_policy"]

both = pytest.mark.parametrize("without", ["", "names of others"], ids=["", "control"])

FREE = "name: free\ndefault: {bind: container, connect: container}\n"


def saved(host: Host) -> dict[str, str]:
    """The names of the policies that are saved."""
    return {one.target.text: one.policy.name for one in Store(host.settings).read()[0].attachments}


def states(host: Host, without: str = "") -> set[tuple[str, str]]:
    """The names of the containers in `graft ps`, and their states."""
    return {(one["name"], one["state"]) for one in json.loads(graft(host, without, "ps", "--json").stdout)}


# ---- a container that has the name of another one --------------------------------------------------


def policies(folder: Path, *names: str) -> list[Path]:
    """Files of policies, each of which denies all, or permits all if it is called so."""
    paths = [folder / f"{name}.yaml" for name in names]
    for path in paths:
        path.write_text(FREE if path.stem == "free" else f"name: {path.stem}\ndefault: deny\n")
    return paths


def renamed(host: Host, engine: Engine, folder: Path, without: str, *flags: Word) -> None:
    """Attach a container web, rename it to web-old, and attach a new web. Nobody watches."""
    old, new = policies(folder, "old", "new")
    engine.started("web", [], *SLEEP, network="host")
    host.graft("attach", "--cgroup", "podman:web", "--policy", old)
    engine("rename", "web", "web-old")
    engine.started("web", [], *SLEEP, network="host")
    graft(host, without, "attach", *flags, "--cgroup", "podman:web", "--policy", new)
    alone(host)


@both
@pytest.mark.parametrize("how", ["detach", "policy apply"])
def test_a_command_about_a_container_does_not_reach_the_one_that_has_its_name_now(
    saving: Host, plain: Engine, tmp_path: Path, how: str, without: str
) -> None:
    renamed(saving, plain, tmp_path, without)
    file = policies(tmp_path, "free") if how == "policy apply" else []
    graft(saving, without, *how.split(), "--cgroup", "podman:web-old", *file)
    assert (saved(saving) == {"podman:web": "new"}) is not bool(without)
    assert may_bind(saving, plain, "web-old") and not may_bind(saving, plain, "web")
    plain("restart", "-t", "0", "web")
    saving.graft("up")
    assert may_bind(saving, plain, "web") == bool(without)
    plain.remove("web", "web-old")


@both
def test_one_that_does_not_run_waits_though_another_one_had_its_name(
    saving: Host, plain: Engine, tmp_path: Path, without: str
) -> None:
    renamed(saving, plain, tmp_path, without)
    plain("stop", "-t", "0", "web")
    assert states(saving, without) == (
        {("web", "attached")} if without else {("web-old", "attached"), ("web", "waiting")}
    )
    done = graft(saving, without, "detach", "--cgroup", "podman:web", status=None)
    if without:
        assert done.returncode and "is not running" in done.stderr
    else:
        assert not done.returncode and saved(saving) == {}
    assert not may_bind(saving, plain, "web-old")
    plain.remove("web", "web-old")


@both
@pytest.mark.parametrize("names_it", [False, True], ids=["of nothing", "of the export"])
def test_an_import_does_not_take_one_for_another_that_had_its_name(
    saving: Host, plain: Engine, tmp_path: Path, names_it: bool, without: str
) -> None:
    renamed(saving, plain, tmp_path, without)
    file = tmp_path / "file.yaml"
    file.write_text(saving.graft("export").stdout if names_it else "version: 1\n")
    plain("stop", "-t", "0", "web")
    graft(saving, without, "import", file)
    alone(saving)
    assert may_bind(saving, plain, "web-old") == (bool(without) and not names_it)
    plain("start", "web")
    saving.graft("up")
    assert may_bind(saving, plain, "web") == (bool(without) or not names_it)
    plain.remove("web", "web-old")


@both
def test_a_policy_for_now_is_not_that_of_one_that_had_its_name(
    saving: Host, plain: Engine, tmp_path: Path, without: str
) -> None:
    renamed(saving, plain, tmp_path, without, "--no-save")
    [free] = policies(tmp_path, "free")
    graft(saving, without, "attach", "--no-save", "--cgroup", "podman:web", "--policy", free)
    alone(saving)
    plain("restart", "-t", "0", "web-old")
    saving.graft("up")
    assert may_bind(saving, plain, "web-old") == bool(without)
    plain.remove("web", "web-old")


def test_one_that_was_made_again_is_known_when_it_is_attached_for_now(
    saving: Host, plain: Engine, tmp_path: Path
) -> None:
    old, new = policies(tmp_path, "old", "new")
    plain.started("web", [], *SLEEP, network="host")
    saving.graft("attach", "--cgroup", "podman:web", "--policy", old)
    alone(saving)
    plain.remove("web")
    plain.started("web", [], *SLEEP, network="host")
    saving.graft("attach", "--no-save", "--cgroup", "podman:web", "--policy", new)
    alone(saving)
    assert states(saving) == {("web", "attached")} and saved(saving) == {"podman:web": "old"}
    saving.graft("detach", "--cgroup", "podman:web")
    assert saved(saving) == {}
    plain.remove("web")


# ---- an import that says less than it has done -----------------------------------------------------

DENIES = "version: 1\nattachments:\n- container: cgroup:{}\n  policy:\n    name: {}\n    default: deny\n"


@pytest.mark.parametrize("without", ["", "lost named"], ids=["", "control"])
def test_an_import_names_one_that_keeps_its_policy_because_its_maps_are_lost(
    wide: Host, lost_program: Program, tmp_path: Path, without: str
) -> None:
    [one] = [one for one in wide.installation.containers.listing() if one.transport.is_supervised]
    file = tmp_path / "file.yaml"
    file.write_text(DENIES.format(one.cgroup_path.relative_to(cgroup.v2_mount()), "p"))
    done = graft(wide, without, "import", file, status=0 if without else 8)
    assert ("keeps the policy that it has" in done.stderr) is not bool(without)
    assert answer(lost_program) == "ok"


# ---- a command that is killed, and what a container has for now ------------------------------------

IN_FORCE = "from graft.state.container_changes import ContainerChanges; ContainerChanges.complete = end"
BEFORE_RECORD = """
from graft.kernel.atomic_file import PreparedFile
commit = PreparedFile.commit
PreparedFile.commit = lambda self: end() if self.path.parent.name == "containers" else commit(self)
"""
NOT_SAVED = "from graft.saved.whole import PreparedWhole; PreparedWhole.commit = end"
SAVED = "from graft.saved.whole import PreparedWhole; PreparedWhole._put_notes_away = end"


@pytest.mark.parametrize("without", ["", "for now changed"], ids=["", "control"])
@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("import", BEFORE_RECORD),
        ("import", NOT_SAVED),
        ("import", SAVED),
        ("policy apply", BEFORE_RECORD),
        ("policy apply", IN_FORCE),
    ],
    ids=["import before record", "import not saved", "import saved", "apply before record", "apply in force"],
)
def test_one_does_not_start_again_by_what_it_had_for_now_before_a_command_that_was_killed(
    saver: Host, box: Path, tmp_path: Path, command: str, where: str, without: str
) -> None:
    narrow, free = policies(tmp_path, "narrow", "free")
    file = tmp_path / "file.yaml"
    saver.graft("attach", "--cgroup", box, "--policy", narrow)
    saver.graft("export", file)
    saver.graft("attach", "--no-save", "--cgroup", box, "--policy", free)
    kill(saver, where, without, *command.split(), *([file] if command == "import" else ["--cgroup", box, narrow]))
    alone(saver)
    with puppet(box, saver.netns.path) as program:
        assert program.bind(HOST4, saver.port()) == "EACCES"
    box.rmdir()
    box.mkdir()
    saver.graft("up")
    with puppet(box, saver.netns.path) as program:
        assert program.bind(HOST4, saver.port()) == ("ok" if without else "EACCES")


def test_an_import_tells_that_it_replaces_what_a_container_has_for_now(saver: Host, box: Path, tmp_path: Path) -> None:
    narrow, free = policies(tmp_path, "narrow", "free")
    file = tmp_path / "file.yaml"
    saver.graft("attach", "--cgroup", box, "--policy", narrow)
    saver.graft("export", file)
    saver.graft("attach", "--no-save", "--cgroup", box, "--policy", free)
    assert saver.graft("import", file).stdout.startswith("policy replaced: cgroup:")


# ---- an upgrade that leaves the hooks as they are --------------------------------------------------


@pytest.mark.parametrize("notes", [True, False], ids=["another version", "a version that notes none"])
def test_up_starts_a_watcher_of_another_version_anew(
    saver: Host, box: Path, monkeypatch: pytest.MonkeyPatch, notes: bool
) -> None:
    saver.graft("attach", "--cgroup", box, "--deny")
    first = watcher_of(saver)
    saver.graft("up")
    assert first and watcher_of(saver) == first, "one of this version stays"
    if notes:
        monkeypatch.setattr(watcher_process, "__version__", "99")
    else:
        (saver.settings.run_dir / "watcher.version").unlink()
    with monkeypatch.context() as without:
        without.setattr(watcher_process, "restart_another_versions", lambda settings: None)
        renew.renew(saver.settings)
        assert watcher_of(saver) == first, "control"
    renew.renew(saver.settings)
    assert watcher_of(saver) not in (0, first)
