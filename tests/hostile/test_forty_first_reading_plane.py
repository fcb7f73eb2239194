"""What a forty-first reading found: a state directory that became read-only kept what is saved from being restored, and
a data plane that was made anew was changed by what a command had read of the one before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from graft.commands import watcher_process
from graft.commands.restore import restore
from graft.datapath import attachments
from graft.datapath.programs import PROGRAMS
from graft.saved.store import Store
from graft.saved.whole import old_of
from graft.state import lost_hooks, nesting
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import box, saver
from tests.hostile.conftest import graft_without
from tests.hostile.test_fortieth_reading_records import DENIES, ENDS, kill
from tests.support.cgroups import attach_points, new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.puppet import puppet
from tests.support.shell import Result, Word, run
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
    try:  # EBUSY while somebody writes there: the watcher, which has an attachment to note
        until("it is read-only", lambda: run(["mount", "-o", "remount,bind,ro", folder]).returncode == 0)
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


# ---- a data plane that is made anew while a command runs -------------------------------------------

STOPS = """
from graft.commands import {module}
def stop_before(call):
    def stopped(*given, **named):
        os.kill(os.getpid(), signal.SIGSTOP)
        return call(*given, **named)
    return stopped
{module}.{name} = stop_before({module}.{name})
"""
"""Stops a command there: it may wait for minutes, for a lock or for what a container prolongs."""

BEFORE_HOOKS = STOPS.format(module="attach", name="_create")
BEFORE_LOCK = STOPS.format(module="saving", name="alone")
BEFORE_REMOVAL = STOPS.format(module="detach", name="take_away")
REPLACED = "Graft was taken down, and brought up again, at the same time"


def across(host: Host, where: str, is_control: bool, words: list[Word], meanwhile: Callable[[], object]) -> Result:
    """Run a command that stops somewhere, until Graft was taken down and brought up, and this was done."""
    without = "replaced plane" if is_control else ""
    command = [sys.executable, "-c", ENDS % where, without, *map(str, words)]
    environment = {**os.environ, **host.environment}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
        stat = Path(f"/proc/{one.pid}/stat")
        try:
            until("it waits", lambda: stat.read_text().rpartition(") ")[2][0] == "T")
            host.graft("down", "--force")
            host.graft("up")
            meanwhile()
        except BaseException:
            one.kill()
            raise
        os.kill(one.pid, signal.SIGCONT)
        out, err = one.communicate(timeout=30)
        return Result(command, one.returncode, out, err)


@CONTROL
def test_an_attach_does_not_go_on_in_another_data_plane(
    bare_host: Host, box: Path, write_policy: WritePolicy, is_control: bool
) -> None:
    host = bare_host
    attach: list[Word] = ["attach", "--cgroup", box, "--policy", write_policy(DENIES)]
    host.graft("up")
    done = across(host, BEFORE_HOOKS, is_control, attach, lambda: None)
    if is_control:
        assert done.returncode == 0 and attach_points(box) == EVERY and may_bind(host, box), "control"
        lacks = "it has no rules: detach and attach it again"
        assert lacks in host.graft("ps").stderr and lacks in host.graft("up").stderr
        assert lacks in host.graft(*attach, status=6).stderr
        host.graft("detach", "--cgroup", box)
    else:
        assert done.returncode == 4 and REPLACED in done.stderr
        assert attach_points(box) == set() and host.ps() == []
    host.graft(*attach)
    assert not may_bind(host, box)


@CONTROL
def test_an_attach_gets_the_endpoints_that_it_names(
    saver: Host, box: Path, write_policy: WritePolicy, is_control: bool
) -> None:
    """They have other numbers in the next data plane, where they are made in the order of their names."""
    web, db = saver.port(), saver.port()
    saver.graft("ep", "add", "web", f"0.0.0.0:{web}")
    saver.graft("ep", "add", "db", f"0.0.0.0:{db}")
    policy = write_policy("name: web\ndefault: deny\ningress: [{bind: '0.0.0.0:80', endpoint: web}]\n")
    attach: list[Word] = ["attach", "--cgroup", box, "--policy", policy]
    done = across(saver, BEFORE_LOCK, is_control, attach, lambda: None)
    if not is_control:
        assert done.returncode == 4 and REPLACED in done.stderr
        assert Store(saver.settings).read()[0].attachments == ()
        saver.graft(*attach)
    with puppet(box, saver.netns.path) as program:
        server = program.socket()
        assert [program.say("bind", server, "0.0.0.0", 80), program.say("listen", server)] == ["ok", "ok"]
        assert (saver.netns.listens(web), saver.netns.listens(db)) == (not is_control, is_control)


@CONTROL
def test_a_detach_removes_nothing_of_another_data_plane(
    bare_host: Host, box: Path, write_policy: WritePolicy, is_control: bool
) -> None:
    """A container there has the number of the one that was found."""
    host, policy = bare_host, write_policy(DENIES)
    host.graft("up")
    host.graft("attach", "--cgroup", box, "--policy", policy)
    with new_cgroup("other") as other:
        attach: list[Word] = ["attach", "--cgroup", other, "--policy", policy]
        detach: list[Word] = ["detach", "--cgroup", box]
        done = across(host, BEFORE_REMOVAL, is_control, detach, lambda: host.graft(*attach))
        assert done.returncode == (0 if is_control else 4)
        assert may_bind(host, other) is is_control
        host.graft("down", "--force")


# ---- what a killed attach has left of a cgroup that was attached before ------------------------------

SOME_HOOKS = """
from graft.kernel import bpf
count, attach = [0], bpf.prog_attach
def some(*given):
    count[0] += 1
    attach(*given) if count[0] < 10 else end()
bpf.prog_attach = some
"""


@CONTROL
def test_a_killed_attach_is_undone_where_the_cgroup_was_attached_before(
    host: Host, write_policy: WritePolicy, is_control: bool
) -> None:
    attach: list[Word] = ["attach", "--policy", write_policy(DENIES), "--cgroup"]
    with new_cgroup("outer") as outer, new_cgroup("inner", outer) as inner:
        host.graft(*attach, inner)
        host.graft("detach", "--cgroup", inner)
        kill(host, SOME_HOOKS, "", *attach, inner)
        run([*graft_without("scopes left" if is_control else ""), "up"], environment=host.environment, status=0)
        assert bool(attach_points(inner)) is is_control
        assert host.graft(*attach, outer, status=None).returncode == (7 if is_control else 0)
        host.remove_at(outer)
        attachments.detach(host.settings, inner)


# ---- hooks that are lost, and what is attached below meanwhile ---------------------------------------


@CONTROL
def test_nothing_is_attached_below_one_whose_hooks_are_lost(
    host: Host, write_policy: WritePolicy, is_control: bool
) -> None:
    """It gets them again: each call below would be decided twice."""
    attach: list[Word] = ["attach", "--policy", write_policy(DENIES), "--cgroup"]
    with new_cgroup("outer") as outer, new_cgroup("inner", outer) as inner:
        host.graft(*attach, outer)
        attachments.detach(host.settings, outer)
        command = [*graft_without("hooks above only" if is_control else ""), *attach, inner]
        done = run(command, environment=host.environment, status=None)
        assert done.returncode == (0 if is_control else 7)
        assert is_control or f"lies below {outer}, which is attached" in done.stderr
        run([*graft_without("hooks above only" if is_control else ""), "ps"], environment=host.environment, status=0)
        assert attach_points(outer) == EVERY and attach_points(inner) == (EVERY if is_control else set())
        host.remove_at(inner)
        host.remove_at(outer)


@CONTROL
def test_lost_hooks_are_not_attached_again_above_others(
    host: Host, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch, is_control: bool
) -> None:
    with new_cgroup("outer") as outer, new_cgroup("inner", outer) as inner, host.installation as graft:
        host.graft("attach", "--cgroup", outer, "--policy", write_policy(DENIES))
        attachments.detach(host.settings, outer)
        attachments.attach(host.settings, inner, 0)  # as another installation would
        if is_control:
            monkeypatch.setattr(nesting, "refuse_below", lambda path: None)
        problems = lost_hooks.attach_again(graft, graft.containers.listing())
        assert attach_points(outer) == (EVERY if is_control else set())
        assert [f"{outer} lies above {inner}" in one for one in problems.values()] == ([] if is_control else [True])
        attachments.detach(host.settings, inner)
        host.remove_at(outer)


# ---- a command that is killed between the rules and the record ----------------------------------------

IN_FORCE = """
from graft.kernel.atomic_file import PreparedFile
commit = PreparedFile.commit
def some(self):
    end() if self.path.parent.name == "containers" else commit(self)
PreparedFile.commit = some
"""
NOT_YET = """
from graft.datapath import layout
from graft.kernel.bpf import Map
put = Map.put
def some(self, key, value):
    end() if isinstance(value, layout.ContainerValue) else put(self, key, value)
Map.put = some
"""


def policies(host: Host) -> list[str]:
    """What the records say."""
    return [one.policy for one in host.installation.containers.listing()]


@CONTROL
def test_a_record_tells_of_the_policy_that_a_killed_command_has_put_in_force(
    bare_host: Host, box: Path, write_policy: WritePolicy, is_control: bool
) -> None:
    """And who narrows that by its name finds the container."""
    host = bare_host
    host.graft("up")
    host.graft("attach", "--cgroup", box, "--policy", write_policy(DENIES))
    kill(host, IN_FORCE, "", "attach", "--cgroup", box, "--policy", write_policy(FREE))
    assert policies(host) == ["p"] and may_bind(host, box)
    without = graft_without("prepared records" if is_control else "")
    run([*without, "ps"], environment=host.environment, status=0)
    assert policies(host) == (["p"] if is_control else ["free"])
    narrower = write_policy("name: free\ndefault: deny\n")
    run([*without, "policy", "apply", narrower], environment=host.environment, status=3 if is_control else 0)
    assert may_bind(host, box) is is_control
    host.graft("down", "--force")


def test_it_does_so_before_rules_get_another_number_and_not_before_they_are_in_force(
    bare_host: Host, box: Path, write_policy: WritePolicy
) -> None:
    host, folder = bare_host, bare_host.settings.run_dir / "containers"
    host.graft("up")
    host.graft("attach", "--cgroup", box, "--policy", write_policy(DENIES))
    attach: list[Word] = ["attach", "--cgroup", box, "--policy", write_policy(FREE)]
    for where, policy in ((NOT_YET, "p"), (IN_FORCE, "free")):
        kill(host, where, "", *attach)
        assert len(list(folder.iterdir())) == 2
        address = f"{HOST4}:{host.port()}"
        host.graft("ep", "set", host.endpoint(address), address)
        assert len(list(folder.iterdir())) == 1 and policies(host) == [policy]
        assert may_bind(host, box) is (policy == "free")
    host.graft("down", "--force")
