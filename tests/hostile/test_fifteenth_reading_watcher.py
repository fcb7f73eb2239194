"""What a fifteenth reading found about the watcher of saved containers: who keeps it from its work, or takes memory.

What needs no kernel is in tests/unit/test_watcher.py and test_restore.py.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.commands import watcher_process
from graft.commands.sightings import SETTLED_SECONDS
from graft.errors import KernelError
from graft.kernel import cgroup, netns
from graft.state import engines, helper_process
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import attached, box, saver, watcher_of
from tests.hostile.conftest import graft_without
from tests.hostile.test_eighth_reading_folders import HOLDER, running
from tests.hostile.test_ninth_reading_splice import forget_names
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import namespace
from tests.support.policies import one_endpoint
from tests.support.puppet import puppet
from tests.support.shell import AS_NOBODY, Word, run
from tests.support.wait import until

pytestmark = pytest.mark.e2e
__all__ = ["box", "saver", "write_policy"]


def watch_without(host: Host, defence: str) -> int:
    """Have the watcher of ``host`` lack a defence, or none. Its process id."""
    watcher_process.stop(host.settings)
    host.start_command([*graft_without(defence), "watch"])
    return until("it watches", lambda: watcher_of(host))


def children_of(pid: int) -> list[str]:
    """The states of a process's children, zombies too (proc_pid_status(5))."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if fields["PPid"] == str(pid):
            found.append(fields["State"])
    return found


# ---- who holds a folder above a saved container's cgroup --------------------------------------------

HOLDS_WITHOUT_CACHE = HOLDER.replace("signal.alarm(100)", "signal.alarm(600)").replace(
    "fd = os.open(path", "os.mkdir(path + '/other')\nfd = os.open(path", 1
)
"""What the kernel has cached of names that are not there counts no more when another one is made."""


@pytest.mark.parametrize("defence", ["", "left behind"])
def test_who_holds_a_folder_has_the_watcher_leave_few_children_there(saver: Host, defence: str) -> None:
    with new_cgroup("delegated") as outer:
        os.chown(outer, 65534, 65534)
        (outer / "inner").mkdir()
        saver.graft("attach", "--cgroup", outer / "inner", "--deny")
        watcher = watch_without(saver, defence)
        (outer / "inner").rmdir()
        until("it waits", lambda: [one["state"] for one in saver.ps()] == ["waiting"])
        time.sleep(9)  # it has tried for the last time
        assert children_of(watcher) == []
        with running([sys.executable, "-c", HOLDS_WITHOUT_CACHE, str(outer), "0"]):
            most = 0
            for _ in range(8):  # each change that is saved has it try again, which nobody has to wait for
                saver.graft("ep", "add", f"e{saver.port()}", f"10.98.0.1:{saver.port()}")
                time.sleep(4)
                most = max(most, len(children_of(watcher)))
            if defence:
                assert most > 6, "the control leaves one behind each time"
                return
            assert 0 < most <= 3, "one for what it watches, one for where the container was"
        until("they are reaped", lambda: children_of(watcher) == [], timeout=60)
        (outer / "other").rmdir()
        (outer / "inner").mkdir()
        until("it is attached", lambda: attached(saver, outer / "inner"), timeout=45)


# ---- who makes and removes a saved container's cgroup all the time ----------------------------------

MAKES_AND_REMOVES = """
import os, sys, time
print("ready", flush=True)
while True:
    os.rmdir(sys.argv[1])
    time.sleep(1.5)
    os.mkdir(sys.argv[1])
    time.sleep(1.5)
"""


@pytest.mark.parametrize("defence", ["", "own clocks"])
def test_changes_of_one_container_do_not_keep_another_one_from_its_policy(
    saver: Host, write_policy: WritePolicy, defence: str
) -> None:
    """It had a network namespace of its own, and comes back without: it gets another transport when it has settled."""
    with new_cgroup("tenant") as tenant, new_cgroup("victim") as victim, namespace("inside") as inside:
        os.chown(tenant, 65534, 65534)
        run([*AS_NOBODY, "mkdir", tenant / "own"], status=0)
        port = saver.port()
        saver.graft("ep", "add", "web", f"0.0.0.0:{port}")
        with puppet(victim, inside.path):
            saver.graft("attach", "--cgroup", victim, "--policy", write_policy(one_endpoint("web")))
        saver.graft("attach", "--cgroup", tenant / "own", "--deny")
        watch_without(saver, defence)
        cgroup.remove(victim)
        words: list[Word] = [*AS_NOBODY, sys.executable, "-c", MAKES_AND_REMOVES, tenant / "own"]
        with running(words), ExitStack() as stack:
            time.sleep(3)
            victim.mkdir()
            program = stack.enter_context(puppet(victim, saver.netns.path))
            if defence:
                time.sleep(SETTLED_SECONDS + 12)
                assert not attached(saver, victim) and program.bind("0.0.0.0", saver.port()) == "ok"
                return
            until("it is attached", lambda: attached(saver, victim), timeout=SETTLED_SECONDS + 10)
            assert program.bind("0.0.0.0", saver.port()) == "EACCES"


# ---- who holds the watcher's own folder in /proc ----------------------------------------------------

HOLDS_FOR_LONG = HOLDER.replace("signal.alarm(100)", "signal.alarm(600)")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("defence", ["", "own descriptors"])
def test_the_watcher_attaches_while_its_folder_in_proc_is_held(saver: Host, box: Path, defence: str) -> None:
    """The control: it hangs. `graft ps` says so then, and `graft down` removes all that it can."""
    with namespace("inside") as inside, ExitStack() as stack:
        saver.graft("ep", "add", "web", f"0.0.0.0:{saver.port()}")
        with puppet(box, inside.path):
            saver.graft("attach", "--cgroup", box, "-i", "0.0.0.0:80=web")
        watcher = watch_without(saver, defence)
        time.sleep(9)  # it has tried for the last time
        forget_names()
        stack.enter_context(running([sys.executable, "-c", HOLDS_FOR_LONG, f"/proc/{watcher}", "0"]))
        cgroup.remove(box)
        until("it waits", lambda: not attached(saver, box))
        box.mkdir()
        stack.enter_context(puppet(box, inside.path))
        if not defence:
            until("it is attached", lambda: attached(saver, box))
            assert saver.graft("ps").stderr == ""
            return
        waits = f"(process {watcher}) has waited"
        until("ps says so", lambda: attached(saver, box) or waits in said(saver.graft("ps").stderr), timeout=90)
        if attached(saver, box):
            pytest.skip("somebody has looked the names up again: the control shows nothing this time")
        down = saver.graft("down", "--force", status=6)
        assert "the watcher does not end" in said(down.stderr) and f"({watcher})" in said(down.stderr)
        assert not saver.settings.pin_dir.exists() and not saver.settings.run_dir.exists()
        stack.close()
        until("it has ended", lambda: not watcher_of(saver))
        saver.graft("down")
        assert not saver.cgroup.exists()


def said(lines: str) -> str:
    """What was said, without the breaks of lines."""
    return " ".join(lines.split())


@pytest.mark.parametrize("asks", [netns.inode, lambda path: os.stat(path).st_ino], ids=["", "looked up"])
def test_the_hosts_namespace_is_told_from_others_while_the_folder_of_its_process_is_held(
    saver: Host, asks: Callable[[Path], int]
) -> None:
    """The watcher asks each time that it attaches; where the host's is that of a process (pid 1, if none is named)."""
    with subprocess.Popen(saver.netns.command("sleep", "100")) as process:
        try:
            until("it is there", lambda: netns.inode(process.pid) == os.stat(saver.netns.path).st_ino)
            path = Path(f"/proc/{process.pid}/ns/net")
            forget_names()
            with running([sys.executable, "-c", HOLDS_FOR_LONG, f"/proc/{process.pid}", "0"]):
                found = helper_process.run_one(lambda: asks(path), 3)
                if asks is not netns.inode and found is not None:
                    pytest.skip("somebody has looked the names up again: the control shows nothing this time")
                assert found == (os.stat(saver.netns.path).st_ino if asks is netns.inode else None)
        finally:
            process.kill()


# ---- who holds what an engine's command looks up ----------------------------------------------------


def test_an_engines_command_that_waits_in_the_kernel_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """podman's looks into /proc/self, which every user can hold; the watcher asks it. The control waits as well."""
    monkeypatch.setattr(engines, "_TIMEOUT", 1.0)
    with tempfile.TemporaryDirectory(prefix="gu-", dir="/run") as folder:
        os.chmod(folder, 0o755)
        command = ["stat", f"{folder}/x"]
        with running([sys.executable, "-c", HOLDS_FOR_LONG, folder, "0"]):
            for _ in range(3):
                with pytest.raises(KernelError, match="did not answer"):
                    engines.run(command)
            assert len([one for one in children_of(os.getpid()) if one.startswith("D")]) == 1
            assert helper_process.run_one(lambda: ends(command), 6) is None
        until("it is asked again", lambda: is_asked(command))


def ends(command: list[str]) -> bool:
    """True when the command has ended, or was killed: as it was run before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=1, capture_output=True, check=False)
    return True


def is_asked(command: list[str]) -> bool:
    """Whether an engine's command is started, and answers."""
    try:
        return engines.run(command).status == 1
    except KernelError:
        return False
