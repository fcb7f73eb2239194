"""What a fortieth reading found of hooks that `graft up` took for attached: it asked whether their cgroup was there.
After an upgrade it replaced those of a lost data plane too, and freed who was under them; the watcher stayed as it was.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from graft.commands import health, renew, watcher_process
from graft.datapath import attachments, dataplane, layout, loader, renewal
from graft.datapath.programs import PROGRAMS
from graft.datapath.sources import BpfSources
from graft.errors import KernelError
from graft.kernel import bpf, cgroup
from tests.e2e.test_saved_state import box, saver, watcher_of
from tests.hostile.conftest import graft_without, lines_of
from tests.kernel.test_renewal import Machine
from tests.support.cgroups import attach_points
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.program import Program
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
__all__ = ["box", "saver"]

EVERY = {program.attach for program in PROGRAMS}

CONNECTS = """
import socket, sys
for line in sys.stdin:
    with socket.socket() as one:
        print(one.connect_ex((sys.argv[1], int(sys.argv[2]))), flush=True)
"""


class Born:
    """A program in transport born that no rule lets connect anywhere; started by the command line ``graft``."""

    def __init__(self, host: Host, listener: int, *graft: Word) -> None:
        port = host.port()
        name = f"e{port}"
        run([*graft, "ep", "add", name, f"{HOST4}:{port}"], environment=host.environment, status=0)
        command: list[Word] = [sys.executable, "-uc", CONNECTS, CLIENT4, listener]
        words: list[Word] = ["run", "--deny", "-i", f"0.0.0.0:80={name}", "--", *command]
        self.program: Program = host.start_command([*graft, *words], talk=True)
        self._asked = 0

    def connects(self) -> bool:
        self._asked += 1
        self.program.tell("\n")
        return lines_of(self.program, self._asked)[-1] == "0"


def hooks(host: Host) -> set[str]:
    """The attach points of the supervisors' cgroup at which there is a hook."""
    return attach_points(dataplane.supervisors_cgroup(host.settings))


def change_settings(host: Host, change: Callable[[layout.SettingsValue], object]) -> None:
    """What the data plane notes of itself."""
    maps = host.maps
    value = maps.settings.get(ctypes.c_uint32(0))
    assert value is not None
    change(value)
    maps.settings.put(ctypes.c_uint32(0), value)
    maps.close()


def be_upgraded(host: Host) -> None:
    """Have the hooks in force be another version's, as far as the next command knows."""
    change_settings(host, lambda value: ctypes.memset(value.hooks, 0, len(value.hooks)))


# ---- the hooks of supervisors ------------------------------------------------------------------------

KILLED = """
import os
from graft.datapath import attachments
attachments.attach = lambda *args, **named: os.kill(os.getpid(), 9)
from graft_cli.main import main
main()
"""


def test_an_up_that_was_killed_before_it_attached_is_completed_by_the_next_one(bare_host: Host) -> None:
    host, lazy = bare_host, graft_without("hooks of supervisors")
    run([sys.executable, "-c", KILLED, "up"], environment=host.environment, status=-signal.SIGKILL)
    with host.client.listener(CLIENT4) as listener:
        port = listener.getsockname()[1]
        run([*lazy, "up"], environment=host.environment, status=0)
        assert hooks(host) == set()
        assert Born(host, port, *lazy).connects(), (
            "control: the cgroup is there, and nothing confines what is made there"
        )
        host.stop_programs()

        host.graft("up")
        assert hooks(host) == EVERY
        assert not Born(host, port, GRAFT).connects()


@contextmanager
def only_one_program(path: Path, pin: Path, attach: str) -> Iterator[None]:
    """Have another tool's program at a cgroup, with flags for which the kernel lets no other be attached below."""
    program, folder = bpf.obj_get(pin), os.open(path, os.O_RDONLY)
    kind = bpf.ATTACH_TYPES[attach]
    try:
        bpf.call(bpf._PROG_ATTACH, bpf._AttachAttr(folder, program, kind, 0))
        yield
        bpf.prog_detach(folder, program, kind)
    finally:
        os.close(program)
        os.close(folder)


def test_a_command_fails_as_long_as_the_hooks_cannot_be_attached(bare_host: Host) -> None:
    host = bare_host
    host.graft("up")
    folder = dataplane.supervisors_cgroup(host.settings)
    cgroup.remove(folder)
    with only_one_program(host.cgroup, host.settings.pin_dir / "prog_recvmsg6", "recvmsg6"):
        for words in (["up"], ["up"], ["run", "--deny", "--", "true"]):
            assert f"cannot attach to the cgroup {folder}" in host.graft(*words, status=6).stderr
            assert not folder.exists(), "nobody enters what is not complete"
    host.graft("up")
    assert hooks(host) == EVERY


def test_hooks_that_somebody_takes_away_are_missed(bare_host: Host) -> None:
    host = bare_host
    host.graft("up")
    with host.client.listener(CLIENT4) as listener:
        born = Born(host, listener.getsockname()[1], GRAFT)
        assert not born.connects()
        attachments.detach(host.settings, dataplane.supervisors_cgroup(host.settings))
        assert born.connects(), "control"

        said = "hooks: they are not all attached to the cgroup of supervisors"
        assert said in host.graft("ps").stderr
        [hook] = (one for one in health.ailments(host.settings) if one.name == "hooks")  # as `graft doctor` says it
        assert hook.mend is not None
        os.kill(host.supervisor(born.program), signal.SIGKILL)
        assert born.program.wait() != 0, "no other one starts, and calls do not go on without"
        hook.mend()
        assert hooks(host) == EVERY and said not in host.graft("ps").stderr


# ---- an upgrade after a data plane was lost ------------------------------------------------------------


def lose_and_upgrade(host: Host) -> None:
    """Remove the pins under what runs; another data plane is made, by what restores nothing; then Graft is upgraded."""
    run(["rm", "-rf", host.settings.pin_dir], status=0)
    dataplane.up(host.settings)
    be_upgraded(host)
    renew.renew(host.settings)


def replace_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is replaced by its name, whatever maps it has."""
    monkeypatch.setattr(
        attachments, "_on_maps", lambda folder, kind, name, maps: attachments._named(folder, kind, name)
    )


def at_connect(path: Path) -> list[int]:
    """The hooks of a cgroup that judge a connect."""
    folder = os.open(path, os.O_RDONLY)
    try:
        return bpf.prog_ids(folder, bpf.ATTACH_TYPES["connect4"])
    finally:
        os.close(folder)


def pinned_at_connect(host: Host) -> int:
    """The one that is pinned."""
    program = bpf.obj_get(host.settings.pin_dir / "prog_connect4")
    try:
        return bpf.prog_id(program)
    finally:
        os.close(program)


def test_an_upgrade_leaves_what_a_lost_data_plane_confines(bare_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of transport direct, and a program with a supervisor."""
    host = bare_host
    host.graft("up")
    supervisors = dataplane.supervisors_cgroup(host.settings)
    with ExitStack() as stack:
        machine = Machine(host, stack)
        listener = stack.enter_context(host.client.listener(CLIENT4))
        born = Born(host, listener.getsockname()[1], GRAFT)
        assert machine.confines() and not born.connects()
        before, lost = machine.attached(machine.cgroup), at_connect(supervisors)

        lose_and_upgrade(host)
        assert machine.attached(machine.cgroup) == before
        assert at_connect(supervisors) == [*lost, pinned_at_connect(host)], "none of the version before is left"
        assert machine.confines() and not born.connects()

        replace_any(monkeypatch)
        be_upgraded(host)
        renew.renew(host.settings)
        assert not machine.confines() and born.connects(), "control"


# ---- the watcher -----------------------------------------------------------------------------------------


def test_the_watcher_leaves_maps_of_another_layout_alone(saver: Host, box: Path) -> None:
    saver.graft("attach", "--cgroup", box, "--deny")
    watcher_process.stop(saver.settings)
    box.rmdir()
    change_settings(saver, lambda value: setattr(value, "version", value.version + 1))
    box.mkdir()
    try:
        assert "was made by another version of Graft" in saver.graft("watch", status=4).stderr
        assert not watcher_process.ensure_running(saver.settings)
        assert "was made by another version of Graft" in (saver.settings.run_dir / "watcher.log").read_text()
        assert attach_points(box) == set()

        saver.start_command([*graft_without("layout of the watcher"), "watch"])
        until("control: it attaches", lambda: attach_points(box) == EVERY)
        watcher_process.stop(saver.settings)
    finally:
        change_settings(saver, lambda value: setattr(value, "version", layout.LAYOUT_VERSION))


def test_an_upgrade_has_the_watcher_started_anew(saver: Host, box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver.graft("attach", "--cgroup", box, "--deny")
    first = watcher_of(saver)
    assert first
    # Only the note of them changes.
    monkeypatch.setattr(renewal, "pin_new", lambda settings: loader.digest(BpfSources.read()))

    def does_not_end(settings: object) -> bool:
        raise KernelError("the watcher does not end")

    with monkeypatch.context() as without:
        without.setattr(watcher_process, "stop", does_not_end)
        be_upgraded(saver)
        with pytest.raises(KernelError):
            renew.renew(saver.settings)
        assert not renewal.is_current(saver.settings), "the next one tries again"
        without.setattr(watcher_process, "restart", lambda settings: None)
        be_upgraded(saver)
        renew.renew(saver.settings)
        assert watcher_of(saver) == first, "control"

    be_upgraded(saver)
    renew.renew(saver.settings)
    assert watcher_of(saver) not in (0, first)
    assert renewal.is_current(saver.settings)
