"""What a fortieth reading found in records: one whose hooks were gone counted as attached, a detach said that it had
detached what was being attached, and the rules of a command that was killed stood in the way of later ones.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graft.commands import detach as detach_command
from graft.commands import saving
from graft.commands.attach import attach_seen, look_at
from graft.commands.detach import Detached, NotWaited
from graft.commands.find import find
from graft.datapath import attachments
from graft.saved.store import Store
from graft.state import nesting
from graft.state.engines import FoundContainer
from graft.state.installation import Installation
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import box, saver, watcher_of
from tests.hostile.conftest import graft_without
from tests.support.cgroups import attach_points, new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.puppet import Puppet, puppet
from tests.support.shell import Result, Word, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["box", "saver", "write_policy"]

DENIES = "name: p\ndefault: deny\n"

ENDS = """
import os, signal, sys
from tests.hostile.undefended import DEFENCES
without = sys.argv.pop(1)
if without: DEFENCES[without]()
def end(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
%s
from graft_cli.main import main
main()
"""
"""A command line that is killed at some place. Without a defence."""

HOOKS_OFF = "from graft.state.container_changes import ContainerChanges; ContainerChanges._forget_detached = end"
STILL_PINNED = "from graft.datapath import dataplane; dataplane.remove = end"
SOME_PINNED = """
unlink, count = os.unlink, [0]
def some(path, *, dir_fd=None):
    count[0] += dir_fd is not None
    unlink(path, dir_fd=dir_fd) if count[0] < 30 else end()
os.unlink = some
"""
HALF_WRITTEN = """
from itertools import islice
from graft.datapath import rulesets
entries = rulesets._entries
def some(*given):
    yield from islice(entries(*given), 2)
    end()
rulesets._entries = some
"""
NOT_IN_FORCE = "from graft.state.container_changes import ContainerChanges; ContainerChanges._switch = end"


def kill(host: Host, where: str, without: str, *words: Word) -> None:
    """Run a command that is killed there."""
    run([sys.executable, "-c", ENDS % where, without, *words], environment=host.environment, status=-signal.SIGKILL)


def graft(host: Host, without: str, *words: Word, status: int | None = 0) -> Result:
    return run([*graft_without(without), *words], environment=host.environment, status=status)


# ---- a command is killed when the hooks are off ----------------------------------------------------


@contextmanager
def denied(host: Host, box: Path, policy: Path) -> Iterator[Puppet]:
    """A process in the cgroup, which is attached with a policy that grants nothing."""
    host.graft("attach", "--cgroup", box, "--policy", policy)
    with puppet(box, host.netns.path) as program:
        assert program.bind(HOST4, host.port()) == "EACCES"
        yield program


def attach_after(host: Host, box: Path, policy: Path, without: str) -> None:
    """The next command does not take it for attached, and confines it."""
    with puppet(box, host.netns.path) as program:
        assert not attach_points(box)
        said = graft(host, "hooks again", "attach", "--cgroup", box, "--policy", policy)
        assert ("replaces" in said.stdout + said.stderr) is bool(without)
        assert program.bind(HOST4, host.port()) == ("ok" if without else "EACCES")


@pytest.mark.parametrize("without", ["", "removal noted"], ids=["", "control"])
def test_a_container_does_not_count_as_attached_after_a_detach_that_was_killed(
    host: Host, box: Path, write_policy: WritePolicy, without: str
) -> None:
    policy = write_policy(DENIES)
    host.graft("attach", "--cgroup", box, "--policy", policy)
    kill(host, HOOKS_OFF, without, "detach", "--cgroup", box)
    attach_after(host, box, policy, without)
    host.remove_at(box)


@pytest.mark.parametrize("without", ["", "removal noted"], ids=["", "control"])
def test_it_does_not_after_a_down_that_was_killed(
    bare_host: Host, box: Path, write_policy: WritePolicy, without: str
) -> None:
    policy = write_policy(DENIES)
    bare_host.graft("up")
    bare_host.graft("attach", "--cgroup", box, "--policy", policy)
    kill(bare_host, STILL_PINNED, without, "down", "--force")
    attach_after(bare_host, box, policy, without)


@pytest.mark.parametrize("without", ["", "pins at once"], ids=["", "control"])
def test_up_attaches_what_is_saved_after_a_down_that_was_killed_among_the_pins(
    saver: Host, box: Path, write_policy: WritePolicy, without: str
) -> None:
    with denied(saver, box, write_policy(DENIES)) as program:
        kill(saver, SOME_PINNED, without, "down", "--force")
        assert program.bind(HOST4, saver.port()) == "ok"
        done = saver.graft("up", status=None)
        assert without or not done.returncode, done.stderr
        assert program.bind(HOST4, saver.port()) == ("ok" if without else "EACCES")
        if without:
            run(["rm", "-rf", saver.settings.pin_dir], status=0)


# ---- hooks that somebody has detached --------------------------------------------------------------


@pytest.mark.parametrize("without", ["", "hooks again"], ids=["", "control"])
@pytest.mark.parametrize("how", ["up", "ps", "attach", "policy apply"])
def test_a_container_whose_hooks_are_gone_gets_them_again(
    host: Host, box: Path, write_policy: WritePolicy, how: str, without: str
) -> None:
    policy = write_policy(DENIES)
    with denied(host, box, policy) as program:
        attachments.detach(host.settings, box)
        assert program.bind(HOST4, host.port()) == "ok"
        rest: dict[str, list[Word]] = {"attach": ["--cgroup", box, "--policy", policy], "policy apply": [policy]}
        graft(host, without, *how.split(), *rest.get(how, []))
        assert program.bind(HOST4, host.port()) == ("ok" if without else "EACCES")
    host.remove_at(box)


def test_one_that_cannot_get_its_hooks_again_is_named(host: Host, write_policy: WritePolicy) -> None:
    policy = write_policy(DENIES)
    with new_cgroup("outer") as outer, new_cgroup("inner", outer) as inner:
        host.graft("attach", "--cgroup", inner, "--policy", policy)
        attachments.detach(host.settings, inner)
        attachments.attach(host.settings, outer, 0)  # as another installation would
        named = f"{inner.name}: its hooks were detached, and cannot be attached again"
        commands: list[list[Word]] = [["attach", "--cgroup", inner, "--policy", policy], ["policy", "apply", policy]]
        for words in commands:
            done = host.graft(*words, status=None)
            assert done.returncode and named in done.stderr
        assert f"not confined: {inner.relative_to(outer.parent)}: its hooks" in host.graft("ps").stderr
        attachments.detach(host.settings, outer)
        host.graft("detach", "--cgroup", inner)


def test_what_is_removed_late_leaves_the_hooks_of_the_next_attach(
    host: Host, box: Path, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach: list[Word] = ["attach", "--cgroup", box, "--policy", write_policy(DENIES)]
    host.graft(*attach)
    first = find(host.installation, str(box))
    host.graft("detach", "--cgroup", box)
    host.graft(*attach)
    host.remove(first)
    assert attach_points(box)
    monkeypatch.setattr(nesting, "number_at", lambda maps, path: 0)
    host.remove(first)
    assert not attach_points(box), "the control"
    host.remove_at(box)


# ---- a detach while the container is being attached ------------------------------------------------


def ends_waiting(graft: Installation, text: str, save: bool) -> NotWaited:
    """As before: what waited when the command began."""
    waiting = detach_command._find_waiting(graft, text)
    assert waiting is not None
    with Store(graft.settings).locked():
        saving.forget(Store(graft.settings), waiting.target, save)
    return NotWaited(waiting.target)


@pytest.mark.parametrize("is_control", [False, True], ids=["", "control"])
def test_one_that_is_being_attached_is_detached(
    saver: Host, box: Path, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch, is_control: bool
) -> None:
    """The test does what the watcher does: it attaches the container when `detach` waits for the lock."""
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(DENIES))
    os.kill(watcher_of(saver), signal.SIGSTOP)
    box.rmdir()
    box.mkdir()
    with saver.installation as graft:
        graft.reap()
        [saved] = Store(saver.settings).read()[0].attachments
        locked = Store.locked

        @contextmanager
        def locked_after_the_watcher(store: Store, saves: bool = True) -> Iterator[None]:
            monkeypatch.setattr(Store, "locked", locked)
            seen = look_at(graft, FoundContainer(box, "cgroup", saved.target.name))
            with seen.within_reach(), store.locked():
                attach_seen(graft, seen, saved.policy)
            with store.locked():
                yield

        monkeypatch.setattr(Store, "locked", locked_after_the_watcher)
        if is_control:
            monkeypatch.setattr(detach_command, "_end_waiting", ends_waiting)
        done = detach_command.detach(graft, str(box))
    assert isinstance(done, Detached) is not is_control
    assert bool(attach_points(box)) is is_control
    os.kill(watcher_of(saver), signal.SIGCONT)


# ---- a policy apply that is killed -----------------------------------------------------------------

DECLARES = "name: p\nendpoints: {{decl: '127.0.0.1:{}'}}\ningress: [{{bind: '0.0.0.0:81', endpoint: decl}}]\n{}"
WIDER = "egress: [{to: 0.0.0.0/0, endpoint: decl}]\n"


def entries(host: Host) -> dict[str, int]:
    """How many there are in the maps of rules."""
    maps = host.maps
    return {name: len(list(getattr(maps, name).keys())) for name in ("ingress", "egress", "egress_ports", "uses")}


@pytest.mark.parametrize("then", ["policy apply", "attach", "detach"])
@pytest.mark.parametrize("where", [HALF_WRITTEN, NOT_IN_FORCE], ids=["half written", "not in force"])
def test_rules_of_a_killed_command_stand_in_nobodys_way(
    host: Host, box: Path, write_policy: WritePolicy, where: str, then: str
) -> None:
    narrow, wide = write_policy(DECLARES.format(4001, "")), write_policy(DECLARES.format(4002, WIDER))
    attach: list[Word] = ["attach", "--cgroup", box, "--policy", narrow]
    host.graft(*attach)
    before = entries(host)
    kill(host, where, "", "policy", "apply", wide)
    if then == "detach":
        host.graft("detach", "--cgroup", box)
    host.graft(*(["policy", "apply", narrow] if then == "policy apply" else attach))
    assert entries(host) == before
    assert "4001" in host.graft("ep", "show").stdout
    host.remove_at(box)


def test_without_their_removal_they_do(host: Host, box: Path, write_policy: WritePolicy) -> None:
    narrow, wide = write_policy(DECLARES.format(4001, "")), write_policy(DECLARES.format(4002, WIDER))
    host.graft("attach", "--cgroup", box, "--policy", narrow)
    before = entries(host)
    kill(host, NOT_IN_FORCE, "", "policy", "apply", wide)
    assert "already exists" in graft(host, "left rules", "policy", "apply", narrow, status=4).stderr
    assert entries(host) != before
    host.graft("policy", "apply", narrow)
    assert entries(host) == before
    host.remove_at(box)
