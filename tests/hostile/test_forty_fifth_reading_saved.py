"""What a forty-fifth reading found in what is saved: what could not be read while a command ran, and could be later,
undid that command without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.commands.saving import below_mount
from graft.saved.store import ATTACHMENTS, ENDPOINTS, Store
from tests.e2e.conftest import WritePolicy, _docker, _podman, container_root, docker, podman, write_policy
from tests.e2e.test_saved_state import box, saver
from tests.hostile.test_forty_first_reading_plane import FREE
from tests.hostile.test_forty_first_reading_plane import may_bind as may_bind_in
from tests.hostile.test_forty_first_reading_saved import policies
from tests.hostile.test_forty_fourth_reading_saved import FAILS, NEWER, changed
from tests.hostile.test_thirty_eighth_reading_engines import SLEEP, alone, found, may_bind, plain, saving
from tests.support.cgroups import attach_points, new_cgroup
from tests.support.engines import Engine
from tests.support.installation import Host
from tests.support.shell import Word

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["_docker", "_podman", "box", "container_root", "docker", "found", "plain", "podman", "saver", "saving"]
__all__ += ["write_policy"]

NARROW = "name: free\ndefault: deny\n"
UNREAD = pytest.mark.parametrize("without", ["", "what is unread"], ids=["", "control"])


@pytest.fixture
def other() -> Iterator[Path]:
    """A cgroup for another container."""
    with new_cgroup("other") as path:
        yield path


def files(host: Host) -> list[str]:
    """Those of saved attachments."""
    return [one.name for one in (Store(host.settings).folder / ATTACHMENTS).iterdir()]


# ---- what is known by the name of its file --------------------------------------------------------------


@UNREAD
@pytest.mark.parametrize("how", ["EIO", "newer", "not saved"])
def test_a_container_does_not_start_again_by_the_policy_that_it_had(
    saver: Host, box: Path, write_policy: WritePolicy, how: str, without: str
) -> None:
    before, meanwhile = (NEWER, "") if how == "newer" else ("", FAILS)
    changed(saver, before, "", "attach", "--cgroup", box, "--policy", write_policy(FREE))
    alone(saver)
    apply: list[Word] = ["policy", "apply", write_policy(NARROW), *["--no-save"] * (how == "not saved")]
    changed(saver, meanwhile, without, *apply)
    assert not may_bind_in(saver, box)
    box.rmdir()
    box.mkdir()
    changed(saver, before, "", "up")
    alone(saver)
    assert may_bind_in(saver, box) is bool(without)


@UNREAD
@pytest.mark.parametrize("flags", [[], ["--no-save"]], ids=["", "not saved"])
def test_what_was_detached_is_not_attached_again(
    saver: Host, box: Path, write_policy: WritePolicy, flags: list[Word], without: str
) -> None:
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(FREE))
    alone(saver)
    changed(saver, FAILS, without, "detach", "--cgroup", box, *flags)
    assert not attach_points(box)
    saver.graft("up")
    alone(saver)
    assert bool(attach_points(box)) is bool(without)


@UNREAD
@pytest.mark.parametrize("flags", [[], ["--no-save"]], ids=["", "not saved"])
def test_what_cannot_be_read_is_not_waited_for_any_more(
    saver: Host, box: Path, flags: list[Word], without: str
) -> None:
    changed(saver, NEWER, "", "attach", "--cgroup", box, "--deny")
    alone(saver)
    box.rmdir()
    words: list[Word] = ["detach", "--cgroup", f"cgroup:{below_mount(box)}", *flags]
    done = changed(saver, "", without, *words, status=3 if without else 0)
    assert ("not waited for any more" in done.stdout) is not bool(without)
    assert bool(files(saver)) is bool(without or flags)
    box.mkdir()
    changed(saver, NEWER, "", "up")
    alone(saver)
    assert bool(attach_points(box)) is bool(without)


# ---- what may be of the same container by another name --------------------------------------------------


@UNREAD
def test_a_command_tells_of_what_it_could_not_look_into(
    saver: Host, box: Path, other: Path, write_policy: WritePolicy, without: str
) -> None:
    policy = write_policy(FREE)
    saver.graft("attach", "--cgroup", other, "--policy", policy)
    alone(saver)
    [file] = files(saver)
    attach: list[Word] = ["attach", "--cgroup", box, "--policy", policy]
    apply: list[Word] = ["policy", "apply", write_policy(NARROW), "--cgroup", box]
    for words in (attach, apply, ["detach", "--cgroup", box]):
        done = changed(saver, FAILS, without, *words, status=0 if without else 8)
        assert (f"{file}: cannot be read: Input/output error" in done.stderr) is not bool(without)
        assert (words[0] == "detach") is not bool(attach_points(box))
        assert words[0] != "policy" or not may_bind_in(saver, box)
    alone(saver)
    assert without or files(saver) == [file]


@UNREAD
def test_and_of_what_may_wait_for_the_policy_that_is_applied(
    saver: Host, box: Path, write_policy: WritePolicy, without: str
) -> None:
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(FREE))
    alone(saver)
    box.rmdir()
    done = changed(saver, FAILS, without, "policy", "apply", write_policy(NARROW), status=3 if without else 8)
    assert (f"{files(saver)[0]}: cannot be read: Input/output error" in done.stderr) is not bool(without)
    box.mkdir()


# ---- an endpoint whose file cannot be read --------------------------------------------------------------


@pytest.mark.parametrize("without", ["", "unread endpoints"], ids=["", "control"])
@pytest.mark.parametrize("flags", [[], ["--no-save"]], ids=["", "not saved"])
def test_an_endpoint_is_deleted_whether_or_not_its_file_can_be_read(
    saver: Host, flags: list[Word], without: str
) -> None:
    changed(saver, NEWER, "", "ep", "add", "web", f"0.0.0.0:{saver.port()}")
    alone(saver)
    changed(saver, "", without, "ep", "del", "web", "--force", *flags, status=6 if without else 0)
    changed(saver, NEWER, "", "up")
    assert ("web" in saver.installation.endpoints.by_name()) is bool(without)
    assert any((Store(saver.settings).folder / ENDPOINTS).iterdir()) is bool(without or flags)


def test_nothing_else_is_deleted_in_its_place(saver: Host, tmp_path: Path) -> None:
    """The operator writes the path of a unix socket, or of a file of an attachment."""
    saver.graft("ep", "add", "web", f"0.0.0.0:{saver.port()}")
    file = tmp_path / "web.sock"
    file.touch()
    for name in (str(file), f"../{ENDPOINTS}/web", ".", ".."):
        saver.graft("ep", "del", name, "--force", status=3)
    assert file.exists() and Store(saver.settings).has_endpoint("web")


# ---- a container that has the name of another one ------------------------------------------------------


@pytest.mark.parametrize("without", ["", "names of unread"], ids=["", "control"])
@pytest.mark.parametrize("how", ["attach", "detach", "policy apply"])
def test_what_is_saved_of_one_stays_where_another_one_has_its_name(
    saving: Host, plain: Engine, tmp_path: Path, how: str, without: str
) -> None:
    """web, which is denied all, is renamed; a new web is free for now."""
    strict, free = policies(tmp_path, "strict", "free")
    plain.started("web", [], *SLEEP, network="host")
    saving.graft("attach", "--cgroup", "podman:web", "--policy", strict)
    alone(saving)
    plain("rename", "web", "web-old")
    plain.started("web", [], *SLEEP, network="host")
    attach: list[Word] = ["attach", "--no-save", "--cgroup", "podman:web", "--policy", free]
    status = 0 if without else 8
    changed(saving, FAILS if how == "attach" else "", without, *attach, status=status if how == "attach" else 0)
    if how == "detach":
        changed(saving, FAILS, without, "detach", "--cgroup", "web", status=status)
    if how == "policy apply":
        changed(saving, FAILS, without, "policy", "apply", free, "--cgroup", "web", status=status)
    alone(saving)
    plain("restart", "-t", "0", "web-old")
    saving.graft("up")
    alone(saving)
    assert may_bind(saving, plain, "web-old") is bool(without)
    plain.remove("web", "web-old")
