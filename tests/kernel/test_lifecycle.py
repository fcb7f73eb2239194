"""`graft up` and `graft down`: whole or not at all, also when two come at once."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from graft.datapath import attachments, dataplane
from graft.datapath.dataplane import locked, supervisors_cgroup
from graft.datapath.loader import MAPS
from graft.datapath.programs import PROGRAMS
from graft.errors import KernelError
from graft.kernel import bpf, cgroup
from tests.support.cgroups import attach_points, new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.open_files import open_in
from tests.support.puppet import puppet
from tests.support.shell import Word, run
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.kernel


def pins(host: Host) -> dict[str, int]:
    """What is pinned, and the inode of each pin."""
    folder = host.settings.pin_dir
    return {pin.name: pin.stat().st_ino for pin in folder.iterdir()} if folder.exists() else {}


def beside(host: Host) -> list[str]:
    """Folders that a command left beside the pins."""
    return [one.name for one in host.settings.pin_dir.parent.glob(f"{host.settings.pin_dir.name}?*")]


def cgroups() -> set[str]:
    """The topmost cgroups, without those that another test run, or a benchmark, makes meanwhile."""
    mine = f"graft-test-{os.getpid()}-"
    names = {one.name for one in cgroup.v2_mount().iterdir() if one.is_dir()}
    return {name for name in names if name.startswith(mine) or not name.startswith("graft-")}


def test_up_pins_every_map_and_program_for_root_only(host: Host) -> None:
    assert set(pins(host)) >= {*MAPS, *(f"prog_{program.name}" for program in PROGRAMS)}
    for path in (host.settings.pin_dir, *host.settings.pin_dir.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
    assert beside(host) == []


def test_up_twice_changes_nothing(bare_host: Host) -> None:
    bare_host.graft("up")
    before = pins(bare_host)
    bare_host.graft("ep", "add", "web", "0.0.0.0:80")
    bare_host.graft("up")
    assert pins(bare_host) == before
    assert "web" in bare_host.graft("ep", "show").stdout


def test_commands_at_once_from_scratch_make_one_data_plane(bare_host: Host) -> None:
    environment = {**os.environ, **bare_host.environment}
    commands = [["up"], ["up"], ["ep", "add", "a", "0.0.0.0:80"], ["ep", "add", "b", "0.0.0.0:81"], ["ep", "show"]]
    started = [
        subprocess.Popen([GRAFT, *words], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for words in commands
    ]
    said = [process.communicate(timeout=60 * PATIENCE)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0] * len(started), said
    assert {line.split()[0] for line in bare_host.graft("ep", "show").stdout.splitlines()} == {"a", "b"}
    assert beside(bare_host) == []
    folder = os.open(supervisors_cgroup(bare_host.settings), os.O_RDONLY)
    try:
        assert len(bpf.prog_ids(folder, bpf.ATTACH_TYPES["bind4"])) == 1
    finally:
        os.close(folder)


def test_down_leaves_the_machine_as_it_was(bare_host: Host) -> None:
    before = cgroups()
    bare_host.graft("up")
    bare_host.graft("ep", "add", "web", "0.0.0.0:80", "--netns", str(bare_host.client.path))
    bare_host.graft("run", "-i", "0.0.0.0:80=web", "--", "true")
    bare_host.graft("down")
    assert pins(bare_host) == {} and not bare_host.settings.pin_dir.exists()
    assert beside(bare_host) == []
    assert not bare_host.settings.run_dir.exists()
    assert not (cgroup.v2_mount() / bare_host.settings.cgroup).exists()
    assert cgroups() - before == set()
    assert str(bare_host.settings.run_dir) not in Path("/proc/self/mounts").read_text()
    bare_host.graft("down")  # and may be said again


def test_down_is_refused_while_a_program_runs_and_ends_it_by_force(bare_host: Host) -> None:
    bare_host.graft("up")
    program = bare_host.start("--", "sh", "-c", "echo up; sleep 1000")
    program.says("up")
    refused = bare_host.graft("down", status=4)
    assert refused.stderr.count("\n") == 1 and "--force" in refused.stderr
    bare_host.graft("down", "--force")
    assert program.wait() != 0
    assert program.complained in ("graft: ended by graft down\n", "")  # removed before it, or after it
    assert not bare_host.settings.pin_dir.exists()


def test_down_is_refused_while_a_container_is_attached_and_frees_it_by_force(bare_host: Host) -> None:
    with new_cgroup("attached") as path, puppet(path, bare_host.netns.path, 0):
        bare_host.graft("ep", "add", "web", "0.0.0.0:8080")
        bare_host.graft("attach", "--cgroup", path, "-i", "0.0.0.0:80=web")
        assert "--force" in bare_host.graft("down", status=4).stderr
        bare_host.graft("down", "--force")
        assert cgroup.populated(path)
        assert not bare_host.settings.pin_dir.exists()


def test_with_bad_records_commands_work_and_down_still_counts_their_containers(bare_host: Host) -> None:
    with new_cgroup("attached") as path, puppet(path, bare_host.netns.path, 0):
        bare_host.graft("ep", "add", "web", "0.0.0.0:8080")
        bare_host.graft("attach", "--cgroup", path, "-i", "0.0.0.0:80=web")
        program = bare_host.start("--", "sh", "-c", "echo up; sleep 1000")
        program.says("up")
        records = list((bare_host.settings.run_dir / "containers").glob("*.json"))
        assert len(records) == 2
        for record in records:
            record.write_text("{")
        shown = bare_host.graft("ps")
        assert shown.stdout == ""
        assert all(f"graft: cannot show a container: {record}: not JSON" in shown.stderr for record in records)
        bare_host.graft("run", "-i", "0.0.0.0:80=web", "--", "true")
        assert "2 containers" in bare_host.graft("down", status=4).stderr
        bare_host.graft("down", "--force")
        assert program.wait() != 0
        assert cgroup.populated(path)  # it shared the host's namespace from the start
        assert not bare_host.settings.pin_dir.exists()


def test_a_data_plane_that_cannot_be_loaded_leaves_nothing(bare_host: Host, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    (broken / "bcc").mkdir(parents=True)
    (broken / "bcc" / "__init__.py").write_text("class BPF:\n    def __init__(self, *_, **__): raise Exception('no')\n")
    result = run([GRAFT, "up"], environment=bare_host.environment | python_path(broken))
    assert result.returncode == 6, result.stderr
    assert result.stderr == "graft: the BPF programs cannot be compiled: no\n"
    assert "Traceback" not in result.stderr
    assert not bare_host.settings.pin_dir.exists() and beside(bare_host) == []
    bare_host.graft("up")


def python_path(first: Path) -> dict[str, str]:
    return {"PYTHONPATH": ":".join(filter(None, [str(first), os.environ.get("PYTHONPATH", "")]))}


def test_a_command_that_finds_the_pins_compiles_nothing(host: Host, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    (broken / "bcc").mkdir(parents=True)
    (broken / "bcc" / "__init__.py").write_text("raise SystemExit('bcc was imported')\n")
    environment = host.environment | python_path(broken)
    for words in (["ep", "add", "web", "0.0.0.0:80"], ["ep", "show"], ["run", "-i", "0.0.0.0:80=web", "--", "true"]):
        result = run([GRAFT, *words], environment=environment)
        assert (result.returncode, result.stderr) == (0, "")


def test_the_next_up_repairs_what_a_killed_one_left(bare_host: Host) -> None:
    aside = bare_host.settings.pin_dir.with_name(f"{bare_host.settings.pin_dir.name}-new")
    process = subprocess.Popen([GRAFT, "up"], env={**os.environ, **bare_host.environment})
    until("the folder aside", aside.exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not bare_host.settings.pin_dir.exists()
    bare_host.graft("up")
    assert set(pins(bare_host)) >= set(MAPS) and beside(bare_host) == []


def numbers(host: Host) -> set[int]:
    """The containers in the maps."""
    return {key.value for key in host.maps.containers.keys()}  # noqa: SIM118


KILLED = """
import os
from graft.datapath import attachments
attach = attachments.attach
attachments.attach = lambda *args, **named: (attach(*args, **named), os.kill(os.getpid(), 9))
from graft_cli.main import main
main()
"""


def test_what_a_killed_attach_has_left_is_removed_by_the_next_one(host: Host) -> None:
    with new_cgroup("killed") as path:
        words: list[Word] = ["attach", "--cgroup", path, "-i", "0.0.0.0:80=web"]
        host.graft("ep", "add", "web", "0.0.0.0:8080")
        before = numbers(host)
        run([sys.executable, "-c", KILLED, *words], environment=host.environment, status=-signal.SIGKILL)
        assert len(numbers(host) - before) == 1
        host.graft(*words)
        host.graft("detach", "--cgroup", path)
        assert numbers(host) == before


def test_pins_of_another_version_are_refused(host: Host) -> None:
    settings = host.maps.settings
    value = settings.get(ctypes.c_uint32(0))
    assert value is not None
    value.version += 1
    settings.put(ctypes.c_uint32(0), value)
    try:
        refused = host.graft("ep", "show", status=4)
        assert "another version" in refused.stderr and refused.stderr.count("\n") == 1
    finally:
        value.version -= 1
        settings.put(ctypes.c_uint32(0), value)


def test_who_waits_for_the_lock_is_told_who_has_it(bare_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataplane, "_LOCK_SECONDS", 0.1)
    with locked(bare_host.settings):
        before = len(os.listdir("/proc/self/fd"))
        holds = f"process {os.getpid()} holds {bare_host.settings.run_dir}/lock"
        with pytest.raises(KernelError, match=holds), locked(bare_host.settings):
            pass
        assert len(os.listdir("/proc/self/fd")) == before


def test_who_waits_for_a_lock_that_down_removes_takes_a_new_one(bare_host: Host) -> None:
    entered = threading.Event()

    def wait_for_it() -> None:
        with locked(bare_host.settings):
            entered.set()

    with locked(bare_host.settings):
        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        lock = bare_host.settings.run_dir / "lock"
        until("the thread waits", lambda: open_in(os.getpid(), lock) == 2)
        lock.unlink()
    waiting.join(10)
    assert entered.is_set()
    assert (bare_host.settings.run_dir / "lock").exists(), "it locked a file that no other command can find"


def test_attaching_is_all_or_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_cgroup("other") as folder:
        real, calls = bpf.prog_attach, []

        def failing(cgroup_fd: int, prog_fd: int, kind: int) -> None:
            calls.append(kind)
            if len(calls) == 5:
                raise OSError(28, "no space")
            real(cgroup_fd, prog_fd, kind)

        monkeypatch.setattr(bpf, "prog_attach", failing)
        with pytest.raises(Exception, match="cannot attach"):
            attachments.attach(host.settings, folder, 1)
        assert attach_points(folder) == set()


def test_maps_that_are_no_longer_used_cost_no_descriptors(host: Host) -> None:
    host.installation.endpoints.listing()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        host.installation.endpoints.listing()
    assert len(os.listdir("/proc/self/fd")) == before
