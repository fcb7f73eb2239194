"""An upgrade: `graft up` puts this Graft's hooks in the place of another version's, under containers that go on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.commands import renew
from graft.datapath import attachments, dataplane, renewal
from graft.datapath.loader import ProgramsRefused
from graft.datapath.sources import bpf_source_dir
from graft.errors import GraftError, KernelError
from graft.kernel import bpf
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.puppet import Puppet, puppet

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]

Change = tuple[str, str, str]
"""A file of the hooks, what is written there, and what another version has in its place."""

_DECIDES = "return trace_request(&request, GRAFT_CALL_BIND, rewrite_bind4(ctx, &request));"
_LOOKS_AGAIN = "\tif (!tag)\n\t\ttag = tag_free_bind(ctx);\n"
HOLE: tuple[Change, ...] = (
    ("bind.bpf.c", _DECIDES, "return PASS;"),
    ("bind.bpf.c", _LOOKS_AGAIN, "\treturn PASS;\n"),
)
"""A version that lets a bind through that no rule grants."""
RETURNS_7: Change = ("bind.bpf.c", _DECIDES, "return 7;")
"""A version that the verifier refuses."""
SMALLER_MAP: Change = ("graft.bpf.c", "struct group, u32, GRAFT_MAX_GROUPS", "struct group, u32, GRAFT_MAX_GROUPS / 2")


@pytest.fixture
def as_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.MonkeyPatch]:
    """Has this process be another version of Graft, until the result is undone."""

    def be(*changes: Change) -> pytest.MonkeyPatch:
        folder = tmp_path / "other"
        shutil.copytree(bpf_source_dir(), folder)
        for name, old, new in changes:
            text = (folder / name).read_text()
            assert text.count(old) == 1
            (folder / name).write_text(text.replace(old, new))
        monkeypatch.setattr("graft.datapath.sources.bpf_source_dir", lambda: folder)
        return monkeypatch

    return be


class Machine:
    """A host whose hooks are another version's, with a container in transport direct that may bind one port."""

    def __init__(self, host: Host, stack: ExitStack) -> None:
        self.host, self._stack = host, stack
        self.port = host.port()
        self.cgroup, self.program = self.container(self.port)

    def container(self, port: int) -> tuple[Path, Puppet]:
        """One more."""
        path = self._stack.enter_context(new_cgroup("renewal"))
        program = self._stack.enter_context(puppet(path, self.host.netns.path))
        endpoint = self.host.endpoint(f"{HOST4}:{port}")
        self.host.graft("attach", "--cgroup", path, "--deny", "-i", f"0.0.0.0:80={endpoint}")
        return path, program

    def confines(self, program: Puppet | None = None) -> bool:
        """Whether a bind that no rule grants is refused."""
        result = (program or self.program).bind(HOST4, self.host.port())
        assert result in ("ok", "EACCES")
        return bool(result == "EACCES")

    def attached(self, path: Path) -> dict[int, list[int]]:
        """The programs of a cgroup, by attach point."""
        fd = os.open(path, os.O_RDONLY)
        try:
            return {kind: bpf.prog_ids(fd, kind) for kind in bpf.CGROUP_ATTACH_TYPES}
        finally:
            os.close(fd)

    def is_renewed(self, path: Path) -> bool:
        """Whether each program of a cgroup is one that is pinned now."""
        pinned = set()
        for pin in self.host.settings.pin_dir.glob("prog_*"):
            fd = bpf.obj_get(pin)
            pinned.add(bpf.prog_id(fd))
            os.close(fd)
        return {number for numbers in self.attached(path).values() for number in numbers} <= pinned


@pytest.fixture
def machine_of(bare_host: Host, as_other: Callable[..., pytest.MonkeyPatch]) -> Iterator[Callable[..., Machine]]:
    """Makes one, on which the other version is up."""
    with ExitStack() as stack:

        def make(*changes: Change) -> Machine:
            other = as_other(*changes)
            dataplane.up(bare_host.settings)
            other.undo()
            return Machine(bare_host, stack)

        yield make


def test_up_replaces_the_hooks_of_another_version_and_nothing_else(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(*HOLE)
    host, program = machine.host, machine.program
    listener = program.socket()
    assert program.say("bind", listener, "0.0.0.0", machine.port) == "ok"  # (by the hole, not by a rule)
    before = machine.attached(machine.cgroup)
    assert not machine.confines()
    said = "hooks: those in force are of another version of Graft (graft "
    assert said in host.graft("ps").stderr
    assert said in host.graft("doctor", status=1).stderr

    host.graft("up")
    assert machine.confines()
    after = machine.attached(machine.cgroup)
    assert [len(numbers) for numbers in after.values()] == [len(numbers) for numbers in before.values()]
    assert machine.is_renewed(machine.cgroup) and machine.is_renewed(dataplane.supervisors_cgroup(host.settings))
    assert said not in host.graft("ps").stderr
    pins = sorted(one.name for one in host.settings.pin_dir.iterdir())
    host.graft("up")
    assert machine.attached(machine.cgroup) == after, "once is enough"
    assert sorted(one.name for one in host.settings.pin_dir.iterdir()) == pins
    assert all(one.stat().st_mode & 0o077 == 0 for one in host.settings.pin_dir.iterdir())


def test_rules_tags_and_connections_stay(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(("bind.bpf.c", "/* bind: only", "/* of another version: only"))
    host, program = machine.host, machine.program
    listener = program.listener("0.0.0.0", 80)
    with host.client.connected(HOST4, machine.port) as client:
        accepted = program.say("accept", listener)
        host.graft("up")
        assert machine.is_renewed(machine.cgroup)
        client.sendall(b"after")
        assert program.say("receive", accepted)[0] == "after"
    with host.client.connected(HOST4, machine.port):
        pass
    assert machine.confines()
    assert program.say("name", listener) == ["0.0.0.0", 80]


def test_control_without_it_the_hole_stays(machine_of: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_of(*HOLE)
    monkeypatch.setattr(attachments, "renew", lambda *_: None)
    renew.renew(machine.host.settings)
    assert not machine.confines()


def test_maps_of_another_form_are_refused_and_nothing_is_changed(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(*HOLE, SMALLER_MAP)
    before = machine.attached(machine.cgroup)
    failed = machine.host.graft("up", status=4)
    assert "the map groups has another form in this version of Graft" in failed.stderr
    assert machine.attached(machine.cgroup) == before
    assert not renewal.is_current(machine.host.settings)


def test_other_programs_are_refused_and_nothing_is_changed(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(*HOLE)
    before = machine.attached(machine.cgroup)
    folder = machine.host.settings.pin_dir
    (folder / "prog_recvmsg4").rename(folder / "prog_former")
    failed = machine.host.graft("up", status=4)
    assert "other programs: prog_former, prog_recvmsg4" in failed.stderr
    assert machine.attached(machine.cgroup) == before


def test_what_the_verifier_refuses_changes_nothing(
    machine_of: Callable[..., Machine], as_other: Callable[..., pytest.MonkeyPatch], tmp_path: Path
) -> None:
    machine = machine_of()
    before = machine.attached(machine.cgroup)
    shutil.rmtree(tmp_path / "other")
    other = as_other(RETURNS_7)
    with pytest.raises(ProgramsRefused, match="bind4") as refused:
        renew.renew(machine.host.settings)
    other.undo()
    assert "R0" in refused.value.log
    assert machine.attached(machine.cgroup) == before and machine.confines()
    assert renewal.is_current(machine.host.settings)


def test_a_container_whose_cgroup_is_held_is_named_and_done_later(
    machine_of: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = machine_of(*HOLE)
    host = machine.host
    free, program = machine.container(host.port())
    really = attachments.renew

    def waits(settings: object, path: Path, *rest: int) -> None:
        if path == machine.cgroup:
            time.sleep(60)
        really(host.settings, path, *rest)

    with monkeypatch.context() as held:
        held.setattr(attachments, "renew", waits)
        with pytest.raises(KernelError, match=machine.cgroup.name):
            renew.renew(host.settings)
    assert machine.confines(program) and machine.is_renewed(free)
    assert not machine.confines() and not renewal.is_current(host.settings)
    host.graft("up")
    assert machine.confines() and renewal.is_current(host.settings)


@pytest.mark.parametrize("how", ["detach", "apply"])
def test_one_that_still_has_the_old_ones_is_detached_and_changed_as_others(
    machine_of: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    machine = machine_of(*HOLE)
    host, before = machine.host, machine.attached(machine.cgroup)
    with monkeypatch.context() as none:
        none.setattr(attachments, "renew", lambda *_: None)
        renew.renew(host.settings)
    assert machine.attached(machine.cgroup) == before and not machine.is_renewed(machine.cgroup)
    if how == "detach":
        host.graft("detach", "--cgroup", machine.cgroup)
        assert [*machine.attached(machine.cgroup).values()] == [[]] * len(before)
    else:
        unix = host.endpoint(f"unix:{tmp_path}/sock")
        host.graft("attach", "--cgroup", machine.cgroup, "--deny", "-i", f"0.0.0.0:80={unix}")
        now = machine.attached(machine.cgroup)
        assert all(len(now[kind]) <= 1 for kind in now if kind != bpf.ATTACH_TYPES["sock_ops"])
        assert machine.is_renewed(machine.cgroup)


def test_a_container_without_a_readable_record_has_the_new_ones_too(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(*HOLE)
    [record] = (machine.host.settings.run_dir / "containers").glob("*.json")
    record.write_text("{")
    machine.host.graft("up")
    assert machine.confines() and machine.is_renewed(machine.cgroup)


@pytest.mark.parametrize("pins", [0, 5])
def test_one_that_is_killed_is_done_again(
    machine_of: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, pins: int
) -> None:
    """After some pins, or after all and before any cgroup."""

    class Killed(Exception):
        pass

    def die(*_: object) -> None:
        raise Killed

    machine = machine_of(*HOLE)
    really = renewal._exchange_pins

    def die_between(folder: Path, programs: dict[str, int]) -> None:
        really(folder, dict([*programs.items()][:pins]))
        raise Killed

    with monkeypatch.context() as killed:
        if pins:
            killed.setattr(renewal, "_exchange_pins", die_between)
        else:
            killed.setattr(renew, "_left_after", die)
        with pytest.raises(Killed):
            renew.renew(machine.host.settings)
    left = bpf.obj_get(machine.host.settings.pin_dir / "prog_bind4")
    bpf.obj_pin(left, machine.host.settings.pin_dir / "new-prog_bind4")
    os.close(left)
    assert not renewal.is_current(machine.host.settings)
    later, program = machine.container(machine.host.port())
    machine.host.graft("up")
    for path in (machine.cgroup, later):
        assert machine.is_renewed(path)
    assert machine.confines() and machine.confines(program)


def test_a_command_of_another_version_is_no_failure(machine_of: Callable[..., Machine]) -> None:
    """Commands but `up` work on as they did: the maps are of the same form."""
    machine = machine_of(*HOLE)
    machine.host.graft("detach", "--cgroup", machine.cgroup)
    assert machine.attached(machine.cgroup)[bpf.ATTACH_TYPES["bind4"]] == []
    assert machine.program.bind(HOST4, machine.host.port()) == "ok"
    with pytest.raises(GraftError):
        machine.host.installation.containers.find(str(machine.cgroup))
