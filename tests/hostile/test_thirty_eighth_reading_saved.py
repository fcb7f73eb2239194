"""What a thirty-eighth reading found in what is saved: a container came out of a policy that the operator had put in
force, by a data plane that was lost, a command that was ended, or a policy that was applied by its name.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from graft.commands import saving, transfer
from graft.errors import KernelError
from graft.kernel import atomic_file
from graft.model.settings import Settings
from graft.policy.model import policy_from_flags
from graft.saved import whole
from graft.saved.model import SavedState, Target
from graft.saved.store import Store
from graft.saved.text import export_text
from graft.saved.whole import PreparedWhole
from graft.state import dropped
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import attached, box, saver
from tests.hostile.conftest import graft_without
from tests.hostile.test_thirty_sixth_reading_saved import NARROW, WIDE, connects, wide
from tests.support.cgroups import new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4
from tests.support.program import Program
from tests.support.saved import ATTACHMENT
from tests.support.shell import Word, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(250)]
__all__ = ["box", "saver", "wide", "write_policy"]


# ---- what is for now, when the data plane is lost ---------------------------------------------------


@pytest.fixture
def lost(wide: Host, box: Path, write_policy: WritePolicy) -> Iterator[Host]:
    """A host where ``box`` is saved with a wide policy, has a narrow one for now, and whose bpffs is lost."""
    wide.graft("policy", "apply", "--no-save", write_policy(NARROW))
    assert connects(wide, box) == "EACCES"
    run(["rm", "-rf", wide.settings.pin_dir], status=0)
    yield wide


@pytest.mark.parametrize("command", [["up"], ["ep", "show"]], ids=" ".join)
def test_a_policy_for_now_outlives_the_data_plane(lost: Host, box: Path, command: list[Word]) -> None:
    lost.graft(*command)
    assert attached(lost, box)
    assert connects(lost, box) == "EACCES"
    lost.graft("down")
    lost.graft("up")
    assert connects(lost, box) == "ok", "that ends what is for now"


def test_without_its_note_a_lost_data_plane_puts_the_saved_policy_in_force(lost: Host, box: Path) -> None:
    run([*graft_without("for now when lost"), "up"], environment=lost.environment, status=0)
    assert connects(lost, box) == "ok"


def test_what_was_taken_away_for_now_does_not_come_back_with_a_new_data_plane(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    saver.graft("ep", "add", "web", f"127.0.0.1:{saver.port()}")
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(WIDE.replace("out", "web")))
    saver.graft("detach", "--no-save", "--cgroup", box)
    saver.graft("ep", "del", "--no-save", "web")
    run(["rm", "-rf", saver.settings.pin_dir], status=0)
    saver.graft("up")
    assert "web" not in saver.graft("ep", "show").stdout
    assert saver.ps() == []


# ---- an import that is ended when it has saved ------------------------------------------------------


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """An export of nothing."""
    path = tmp_path / "empty.yaml"
    path.write_text(export_text(SavedState()))
    return path


@pytest.fixture
def ended(empty: Path, wide: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """An import of nothing that is ended when it has saved, before it has taken anything away."""

    def end() -> None:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(transfer._Import, "take_away", interrupt)
            transfer.import_state(wide.settings, transfer.read_export(empty))

    return end


def names_of(host: Host) -> list[str]:
    """The endpoints that there are, and the containers."""
    graft = host.installation
    return [*graft.endpoints.by_name(), *(one.cgroup for one in graft.containers.listing())]


def test_the_next_import_takes_away_what_an_ended_one_has_left(
    wide: Host, box: Path, empty: Path, ended: Callable[[], None]
) -> None:
    ended()
    assert wide.graft("export").stdout == empty.read_text()
    assert names_of(wide) == ["out", str(box)]
    said = wide.graft("import", empty).stdout.splitlines()
    assert [line.partition(":")[0] for line in said] == ["endpoints deleted", "detached"]
    assert names_of(wide) == []
    assert wide.graft("import", empty).stdout == "nothing to change\n"


def test_without_its_note_the_next_import_says_that_there_is_nothing_to_change(
    wide: Host, box: Path, empty: Path, ended: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dropped, "note", lambda settings, what: None)
    ended()
    assert wide.graft("import", empty).stdout == "nothing to change\n"
    assert names_of(wide) == ["out", str(box)]
    assert connects(wide, box) == "ok"


def test_what_an_ended_import_has_left_gets_the_policy_of_the_next_one(
    wide: Host, box: Path, tmp_path: Path, ended: Callable[[], None], write_policy: WritePolicy
) -> None:
    narrow = tmp_path / "narrow.yaml"
    wide.graft("policy", "apply", write_policy(NARROW))
    narrow.write_text(wide.graft("export").stdout)
    wide.graft("policy", "apply", write_policy(WIDE))
    ended()
    assert connects(wide, box) == "ok"
    assert "policy replaced: cgroup:" in wide.graft("import", narrow).stdout
    assert connects(wide, box) == "EACCES"


def test_what_is_attached_for_now_after_an_ended_import_is_left_alone(
    wide: Host, box: Path, empty: Path, ended: Callable[[], None], write_policy: WritePolicy
) -> None:
    ended()
    wide.graft("detach", "--cgroup", box)
    wide.graft("ep", "del", "out")
    wide.graft("attach", "--no-save", "--cgroup", box, "--policy", write_policy(NARROW))
    wide.graft("ep", "add", "--no-save", "out", "127.0.0.1:dynamic")
    assert wide.graft("import", empty).stdout == "nothing to change\n"
    assert names_of(wide) == ["out", str(box)]


@pytest.mark.parametrize("call", ["tell_graftd", "withdraw"])
def test_what_a_container_can_prolong_comes_when_all_is_taken_away(
    empty: Path, wide: Host, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(transfer if call == "withdraw" else transfer._Import, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        transfer.import_state(wide.settings, transfer.read_export(empty))
    assert names_of(wide) == []


# ---- an import that is ended, or fails, while it saves ----------------------------------------------


def fail(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


@pytest.fixture
def widening(wide: Host, tmp_path: Path, write_policy: WritePolicy) -> Path:
    """A file by which ``box`` gets a wider policy than it has."""
    file = tmp_path / "wide.yaml"
    file.write_text(wide.graft("export").stdout)
    wide.graft("policy", "apply", write_policy(NARROW))
    return file


@pytest.mark.parametrize(("sync", "raised"), [(interrupt, KeyboardInterrupt), (fail, KernelError)])
def test_an_import_that_ends_when_its_names_are_synced_has_saved_nothing(
    wide: Host, box: Path, widening: Path, monkeypatch: pytest.MonkeyPatch, sync: Callable[..., None], raised: type
) -> None:
    before = wide.graft("export").stdout
    wide.graft("ep", "add", "other", "127.0.0.1:1")
    wide.graft("ep", "del", "--no-save", "other")
    saved = wide.graft("export").stdout
    assert saved != before
    monkeypatch.setattr(whole, "sync_folder", sync)
    with pytest.raises(raised, match="nothing was changed" if raised is KernelError else None):
        transfer.import_state(wide.settings, transfer.read_export(widening))
    assert wide.graft("export").stdout == saved
    assert connects(wide, box) == "EACCES"
    wide.graft("up")
    assert "other" not in wide.graft("ep", "show").stdout, "what is for now stays so"


def test_without_its_undoing_the_wider_state_stays_saved(
    wide: Host, box: Path, widening: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "sync_folder", fail)
    monkeypatch.setattr(PreparedWhole, "undo", lambda self: None)
    with pytest.raises(KernelError):
        transfer.import_state(wide.settings, transfer.read_export(widening))
    assert wide.graft("export").stdout == widening.read_text()
    assert connects(wide, box) == "EACCES", "until the next boot"


# ---- a policy that is applied by its name -----------------------------------------------------------

OTHER = "name: q\ndefault: deny\n"

CONNECTS = """
import socket, sys
for _ in sys.stdin:
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
        print("ok", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


@pytest.fixture
def lost_program(wide: Host, write_policy: WritePolicy) -> Iterator[Program]:
    """A program of `graft run` whose maps are lost; it says for each line whether it can connect."""
    with wide.client.listener(CLIENT4) as listener:
        where: list[Word] = [CLIENT4, listener.getsockname()[1]]
        words: list[Word] = ["run", "--policy", write_policy(WIDE), "--user", "nobody", "--"]
        command: list[Word] = [*words, "/usr/bin/python3", "-ISc", CONNECTS, *where]
        program = wide.start_command([GRAFT, *command], talk=True)
        assert answer(program) == "ok"
        run(["rm", "-rf", wide.settings.pin_dir], status=0)
        wide.graft("up")
        yield program


def answer(program: Program) -> str:
    """What it says to a line."""
    before = len(program.said.splitlines())
    program.tell("\n")
    program.until("an answer", lambda: len(program.said.splitlines()) > before)
    return program.said.splitlines()[-1]


def test_one_that_keeps_its_policy_because_its_maps_are_lost_is_named(
    wide: Host, lost_program: Program, write_policy: WritePolicy
) -> None:
    done = wide.graft("policy", "apply", write_policy(NARROW), status=8)
    assert "keeps its policy until it ends: its maps are lost" in done.stderr
    assert answer(lost_program) == "ok"
    command = [*graft_without("lost named"), "policy", "apply", write_policy(NARROW)]
    run(command, environment=wide.environment, status=0)


def narrowed_by_name(host: Host, box: Path, write_policy: WritePolicy, *command: Word) -> str:
    """What a connect gives in ``box`` after a boot: it is saved with a wide policy p, and has another for now, when p
    is narrowed.
    """
    with new_cgroup("second") as second:
        host.graft("attach", "--cgroup", second, "--policy", write_policy(WIDE))
        host.graft("policy", "apply", "--no-save", write_policy(OTHER), "--cgroup", box)
        said = run([*command, "policy", "apply", write_policy(NARROW)], environment=host.environment, status=0).stdout
        assert connects(host, box) == "EACCES", "what it has for now"
        assert {one["policy"] for one in host.ps() if one["cgroup"] == str(box)} == {"q"}
        host.graft("down", "--force")
        host.graft("up")
        return said + connects(host, box)


def test_what_is_saved_under_a_name_is_replaced_though_it_has_another_policy_for_now(
    wide: Host, box: Path, write_policy: WritePolicy
) -> None:
    result = narrowed_by_name(wide, box, write_policy, *graft_without(""))
    assert result.endswith("policy p, after the next boot: for now it has another\nEACCES")


def test_without_that_the_old_policy_is_in_force_after_the_next_boot(
    wide: Host, box: Path, write_policy: WritePolicy
) -> None:
    assert narrowed_by_name(wide, box, write_policy, *graft_without("saved otherwise")).endswith("ok")


# ---- a command that is ended while it saves ---------------------------------------------------------

SAVED, FOR_NOW, APPLIED = (policy_from_flags(name, [], [], True) for name in ("saved", "now", "applied"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folders = {"GRAFT_STATE_DIR": str(tmp_path / "state"), "GRAFT_RUN_DIR": str(tmp_path / "run")}
    return Settings.from_environment(folders)


@pytest.fixture
def noted(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A container that is saved with one policy and has another for now. Whoever saves from here on is ended."""
    store = Store(settings)
    with store.locked():
        store.prepare_attachment(replace(ATTACHMENT, policy=SAVED)).commit()
        store.prepare_for_now(ATTACHMENT, FOR_NOW).commit()
    monkeypatch.setattr(atomic_file, "sync_folder", interrupt)
    return store


def end_saving(settings: Settings, name: str) -> None:
    """Attach the container, as it is called now, and be ended while that is saved."""
    made = replace(ATTACHMENT, target=Target("docker", name), policy=APPLIED)
    with (
        pytest.raises(KeyboardInterrupt),
        saving.alone(settings, True),
        saving.attachment(settings, made, True),
    ):
        pass


@pytest.mark.parametrize("name", ["web", "renamed"])
def test_a_container_starts_again_by_the_policy_that_is_in_force(noted: Store, settings: Settings, name: str) -> None:
    end_saving(settings, name)
    [one] = noted.read()[0].attachments
    assert one.policy == APPLIED
    assert noted.wanted(one).policy == APPLIED


def test_without_the_note_in_between_it_starts_again_by_what_it_had_for_now(
    noted: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "has_for_now", lambda self, target: False)
    end_saving(settings, "web")
    [one] = noted.read()[0].attachments
    assert (one.policy, noted.wanted(one).policy) == (APPLIED, FOR_NOW)
