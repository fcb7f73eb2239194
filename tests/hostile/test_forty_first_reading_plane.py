"""What a forty-first reading found: a state directory that became read-only kept what is saved from being restored, and
a data plane that was made anew was changed by what a command had read of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from graft.commands import watcher_process
from graft.commands.restore import restore
from graft.datapath.programs import PROGRAMS
from graft.saved.store import Store
from graft.saved.whole import old_of
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import box, saver
from tests.hostile.conftest import graft_without
from tests.hostile.test_fortieth_reading_records import DENIES
from tests.support.cgroups import attach_points
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.puppet import puppet
from tests.support.shell import run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["box", "saver", "write_policy"]

EVERY = {program.attach for program in PROGRAMS}
FREE = "name: free\ndefault: {bind: container, connect: container}\n"
CONTROL = pytest.mark.parametrize("is_control", [False, True], ids=["", "control"])


def may_bind(host: Host, path: Path) -> bool:
    """Whether a program in the cgroup may bind at the host's address."""
    with puppet(path, host.netns.path) as program:
        return bool(program.bind(HOST4, host.port()) == "ok")


# ---- a state directory that is read-only -----------------------------------------------------------


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """What the kernel does with a file system when its disk fails (ext4: errors=remount-ro)."""
    run(["mount", "--bind", folder, folder], status=0)
    try:
        run(["mount", "-o", "remount,bind,ro", folder], status=0)
        yield
    finally:
        run(["umount", "-l", folder], status=0)


def start_again(host: Host, box: Path, policy: Path) -> Store:
    """Save a container that has ended, and is there again when nobody watches."""
    host.graft("attach", "--cgroup", box, "--policy", policy)
    watcher_process.stop(host.settings)
    box.rmdir()
    box.mkdir()
    return Store(host.settings)


def replaced_half(store: Store) -> None:
    """A command was killed that replaced all that is saved."""
    store.folder.rename(old_of(store.folder))


def never_locked(store: Store) -> None:
    """Somebody has put there what another machine has saved."""
    store.folder.with_name("saved.lock").unlink()


@pytest.mark.parametrize("before", [None, replaced_half, never_locked])
def test_what_is_saved_on_a_disk_that_is_read_only_is_restored(
    saver: Host, box: Path, write_policy: WritePolicy, before: Callable[[Store], None] | None
) -> None:
    store = start_again(saver, box, write_policy(DENIES))
    if before is not None:
        before(store)
    with read_only(saver.settings.state_dir):
        assert saver.graft("up").stderr == ""
        assert attach_points(box) == EVERY and not may_bind(saver, box)
        box.rmdir()
        box.mkdir()
        until("the watcher does so, too", lambda: attach_points(box) == EVERY)


def test_without_that_nothing_is_restored_and_ps_says_so(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    start_again(saver, box, write_policy(DENIES))
    with read_only(saver.settings.state_dir):
        done = run([*graft_without("read-only state"), "up"], environment=saver.environment, status=6)
        assert "Read-only file system" in done.stderr
        assert may_bind(saver, box), "control"
        [one] = saver.ps()
        assert one["state"] == "waiting" and one["waits"].startswith("nothing was restored: cannot save to")


def test_one_whose_place_cannot_be_saved_is_attached_and_does_not_wait(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    store = start_again(saver, box, write_policy(DENIES))
    [saved] = store.read()[0].attachments
    store.prepare_attachment(replace(saved, last=replace(saved.last, id=64 * "a"))).commit()
    with read_only(saver.settings.state_dir), saver.installation as graft:
        done = restore(graft)
    [problem] = done.problems
    assert "where it is now was not saved: cannot save to" in problem and "Read-only file system" in problem
    assert done.attached == [saved.target.text] and not done.waiting and attach_points(box) == EVERY


def test_for_now_all_can_be_changed_there(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    port = saver.port()
    saver.graft("ep", "add", "web", f"0.0.0.0:{port}")
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(FREE))
    deny, again = write_policy(DENIES), write_policy(FREE)
    with read_only(saver.settings.state_dir):
        for words in (
            ["attach", "--cgroup", box, "--policy", deny],
            ["policy", "apply", "--cgroup", box, deny],
            ["detach", "--cgroup", box],
            ["ep", "del", "web"],
        ):
            assert "Read-only file system" in saver.graft(*words, status=6).stderr
            assert attach_points(box) == EVERY and may_bind(saver, box), "what cannot be saved is not done"

        saver.graft("attach", "--no-save", "--cgroup", box, "--policy", deny)
        assert not may_bind(saver, box)
        saver.graft("policy", "apply", "--no-save", "--cgroup", box, again)
        assert may_bind(saver, box)
        saver.graft("ep", "del", "--no-save", "web")
        saver.graft("detach", "--no-save", "--cgroup", box)
        assert attach_points(box) == set()
