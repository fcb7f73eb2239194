"""What a fortieth reading found in `graft import`, and in what is saved: a container kept a wider policy, or came out
of its own, because an import did not know which one its file named; an annotation of the operator's outranked it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from graft.commands import identified, restore, transfer, watcher_process
from graft.commands import saving as saving_commands
from graft.errors import KernelError
from graft.kernel import cgroup
from graft.model.settings import Settings
from graft.saved.model import SavedState, Target
from graft.saved.store import Store
from graft.saved.whole import old_of
from graft.state.records import Container
from tests.e2e.conftest import WritePolicy, _docker, _podman, container_root, docker, podman, write_policy
from tests.e2e.test_saved_state import attached, box, reboot, saver
from tests.hostile.conftest import graft_without
from tests.hostile.test_thirty_eighth_reading_engines import SLEEP, alone, found, may_bind, plain, saving
from tests.hostile.test_thirty_sixth_reading_saved import NARROW, WIDE, connects
from tests.support import engines
from tests.support.engines import Engine
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.puppet import puppet
from tests.support.saved import ATTACHMENT, ENDPOINT
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(250)]
__all__ = ["_docker", "_podman", "box", "container_root", "docker", "found", "plain", "podman", "saver", "saving"]
__all__ += ["write_policy"]

both = pytest.mark.parametrize("without", [False, True], ids=["", "control"])


def import_(host: Host, file: Path, without: bool, status: int = 0) -> subprocess.CompletedProcess[str]:
    """`graft import`, which (``without``) knows a container by where it was last seen."""
    return run(
        [*graft_without("identified" if without else ""), "import", file], environment=host.environment, status=status
    )


# ---- which container a file names -------------------------------------------------------------------


@both
def test_what_others_have_attached_gets_the_policy_of_the_file(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path, without: bool
) -> None:
    file = tmp_path / "narrow.yaml"
    saver.graft("ep", "add", "out", "0.0.0.0:dynamic")
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(NARROW))
    file.write_text(saver.graft("export").stdout)
    saver.graft("detach", "--cgroup", box)
    saver.graft("attach", "--no-save", "--cgroup", box, "--policy", write_policy(WIDE))
    done = import_(saver, file, without, 8 if without else 0)
    if without:
        assert "keeps the policy that it has" in done.stderr, "it does not say: attached"
        assert "attached:" not in done.stdout
    else:
        assert done.stdout.startswith("policy replaced: cgroup:")
    assert connects(saver, box) == ("ok" if without else "EACCES")


BY_HAND = "version: 1\nattachments:\n- container: podman:web\n  policy:\n    name: web\n    default: {}\n"
FREE = "{bind: container, connect: container}"


@both
def test_a_file_that_does_not_say_where_a_container_was_names_it_all_the_same(
    saving: Host, plain: Engine, tmp_path: Path, without: bool
) -> None:
    file, other = tmp_path / "all.yaml", tmp_path / "other.yaml"
    plain.started("web", [], *SLEEP, network="host")
    file.write_text(BY_HAND.format(FREE))
    for _ in range(2):
        import_(saving, file, without)
    file.write_text(BY_HAND.format("deny"))
    import_(saving, file, without)
    assert may_bind(saving, plain, "web") == without
    if not without:
        assert [(one["name"], one["state"]) for one in saving.ps()] == [("web", "attached")]
        other.write_text(f"name: other\ndefault: {FREE}\n")
        saving.graft("policy", "apply", "--cgroup", "podman:web", other)
        assert may_bind(saving, plain, "web")
        saving.graft("detach", "--cgroup", "podman:web")
        assert saving.ps() == []
    plain.remove("web")


def test_an_export_of_before_it_was_made_again_names_it_all_the_same(
    saving: Host, plain: Engine, tmp_path: Path
) -> None:
    file, wide, narrow = (tmp_path / name for name in ("all.yaml", "wide.yaml", "narrow.yaml"))
    wide.write_text("name: web\n")
    narrow.write_text("name: other\ndefault: deny\n")
    plain.started("web", [], *SLEEP, network="host")
    saving.graft("attach", "--cgroup", "podman:web", "--policy", wide)
    saving.graft("export", file)
    plain.remove("web")
    plain.started("web", [], *SLEEP, network="host")
    until("it is attached again", lambda: [one["state"] for one in saving.ps()] == ["attached"])
    after = saving.graft("export").stdout
    assert file.read_text() != after
    assert saving.graft("import", file).stdout == "nothing to change\n"
    assert saving.graft("export").stdout == after
    saving.graft("policy", "apply", "--cgroup", "podman:web", narrow)
    assert not may_bind(saving, plain, "web")
    plain.remove("web")


# ---- one container, and several names ---------------------------------------------------------------


@pytest.fixture
def unit() -> Iterator[Path]:
    """A cgroup with the name of a unit."""
    path = cgroup.v2_mount() / f"graft-{os.getpid()}-web.service"
    path.mkdir()
    yield path
    cgroup.kill(path)
    cgroup.remove(path)


def as_unit(host: Host, unit: Path, file: Path, write_policy: WritePolicy) -> str:
    """Attach it by its path. Gives the export; ``file`` has it by its name as a unit."""
    host.graft("attach", "--cgroup", unit, "--policy", write_policy(NARROW))
    text = str(host.graft("export").stdout)
    file.write_text(text.replace(f"container: cgroup:{unit.name}", f"container: unit:{unit.name}"))
    assert file.read_text() != text
    return text


def listed(host: Host) -> Container:
    [container] = host.installation.containers.listing()
    return container


@both
def test_a_container_that_has_another_name_in_the_file_is_not_detached(
    saver: Host, unit: Path, write_policy: WritePolicy, tmp_path: Path, without: bool
) -> None:
    file = tmp_path / "all.yaml"
    as_unit(saver, unit, file, write_policy)
    before = listed(saver)
    with puppet(unit, saver.netns.path) as program:
        said = import_(saver, file, without).stdout
        assert program.bind(HOST4, saver.port()) == "EACCES"
    after = listed(saver)
    if without:
        assert f"detached: {unit.name}" in said and after.id != before.id, "and attached again, some time later"
    else:
        assert said == f"policy replaced: unit:{unit.name}\n"
        assert (after.id, after.engine, after.name) == (before.id, "systemd", unit.name)


def test_one_container_does_not_get_two_policies(
    saver: Host, unit: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    file = tmp_path / "all.yaml"
    text = as_unit(saver, unit, file, write_policy)
    entry = file.read_text().partition("attachments:\n")[2]
    file.write_text(text + entry.replace("name: p", "name: q"))
    assert "are one container, and have two policies" in saver.graft("import", file, status=4).stderr
    assert saver.graft("export").stdout == text
    file.write_text(text + entry)
    saver.graft("import", file)
    assert attached(saver, unit)


@both
def test_none_is_detached_that_may_be_one_that_cannot_be_looked_for(
    saver: Host, box: Path, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch, without: bool
) -> None:
    box = box / f"libpod-{'ab' * 32}.scope"
    box.mkdir()
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(NARROW))
    [one] = Store(saver.settings).read()[0].attachments
    renamed = replace(one, target=Target("podman", "web"))
    reason = {} if without else {renamed.target: "podman did not answer"}
    monkeypatch.setattr(identified, "look_for", lambda graft, each: ({}, reason))
    if without:
        transfer.import_state(saver.settings, SavedState((), (renamed,)))
    else:
        with pytest.raises(KernelError, match="where podman:web is cannot be known"):
            transfer.import_state(saver.settings, SavedState((), (renamed,)))
    assert attached(saver, box) != without
    saver.remove_at(box)
    box.rmdir()


# ---- an annotation of the operator's, and what is saved ---------------------------------------------


Annotated = Callable[[str], Engine]


@pytest.fixture
def annotated(saving: Host, found: Engine, tmp_path: Path) -> Annotated:
    """podman whose annotations are the operator's, with Graft's runtime, which may lack a defence."""
    (tmp_path / "none").write_text("trust-annotations: true\n")  # GRAFT_RUNTIME_CONFIG of that runtime

    def make(defence: str) -> Engine:
        command: list[Word] | None = [*graft_without(defence), "runtime"] if defence else None
        return replace(found, runtime=("--runtime", str(engines.runtime_script(saving, tmp_path, "crun", command))))

    return make


ANNOTATION = ("--annotation", "graft.policy=wide")


@both
def test_one_that_starts_again_has_what_is_saved_and_not_what_its_annotation_says(
    saving: Host, annotated: Annotated, without: bool
) -> None:
    engine = annotated("saved outranks" if without else "")
    engine.started("web", ANNOTATION, *SLEEP, network="host")
    assert may_bind(saving, engine, "web")
    saving.graft("attach", "--cgroup", "podman:web", "--deny")
    assert not may_bind(saving, engine, "web")
    alone(saving)
    engine("restart", "-t", "0", "web")
    assert may_bind(saving, engine, "web") == without
    engine.remove("web")


@both
def test_one_that_was_made_again_has_what_is_saved_and_not_what_its_annotation_says(
    saving: Host, annotated: Annotated, monkeypatch: pytest.MonkeyPatch, without: bool
) -> None:
    engine = annotated("")
    engine.started("web", ANNOTATION, *SLEEP, network="host")
    saving.graft("attach", "--cgroup", "podman:web", "--deny")
    alone(saving)
    engine.remove("web")
    engine.started("web", ANNOTATION, *SLEEP, network="host")
    if without:
        monkeypatch.setattr(restore, "_is_chosen", lambda container, saved: container.is_operators)
    for _ in range(2):
        with saving.installation as graft:
            assert restore.restore(graft).waiting == {}
        assert may_bind(saving, engine, "web") == without
    assert ([(one["name"], one["engine"]) for one in saving.ps()] == [("web", "podman")]) != without
    engine.remove("web")


# ---- an import that is killed where folders cannot be exchanged -------------------------------------

KILLED = """
import errno, os, signal, sys
from pathlib import Path
from graft.kernel import atomic_file
from graft_cli.main import main

def refuse(*_):
    raise OSError(errno.EINVAL, "an overlay")

def rename(path, target):
    if path.name.startswith("saved"):
        left.pop() if left else os.kill(os.getpid(), signal.SIGKILL)
    return renamed(path, target)

atomic_file.syscall, renamed, Path.rename, left = refuse, Path.rename, rename, [1] * int(sys.argv.pop(1))
main()
"""


def test_an_import_that_is_killed_between_its_renames_loses_nothing(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    file = tmp_path / "all.yaml"
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(NARROW))
    saver.graft("export", file)
    watcher_process.stop(saver.settings)
    done = run([sys.executable, "-c", KILLED, 1, "import", file], environment=saver.environment, status=None)
    assert done.returncode == -signal.SIGKILL, done
    # (A watcher that was started meanwhile may have put it back by now.)
    assert saver.graft("export").stdout == file.read_text()
    reboot(saver, box)
    assert saver.graft("up").stderr == ""
    assert attached(saver, box)


@both
def test_what_is_saved_next_takes_nothing_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: bool
) -> None:
    folders = {"GRAFT_STATE_DIR": str(tmp_path / "state"), "GRAFT_RUN_DIR": str(tmp_path / "run")}
    settings = Settings.from_environment(folders)
    store = Store(settings)
    with store.locked():
        store.prepare_attachment(ATTACHMENT).commit()
        store.prepare_all(SavedState())
        store.folder.rename(old_of(store.folder))  # the first of the three, and the last that it did
    if without:
        monkeypatch.setattr(Store, "_finish_exchange", lambda self, saves: None)
    assert store.exists and store.read() == (SavedState((), (ATTACHMENT,)), [])
    with saving_commands.endpoint(settings, ENDPOINT, True):
        pass
    monkeypatch.undo()
    with store.locked():
        assert store.read() == (SavedState((ENDPOINT,), () if without else (ATTACHMENT,)), [])
    assert not old_of(store.folder).exists()
