"""What the twenty-fifth reading found: a container that prolongs `graft attach`, or `graft run` in a queue, kept the
policy of before; who holds a folder of policies stopped `graft listen`, and, by a container that was held in its start,
had every command wait.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import pytest

from graft.kernel import cgroup, netns
from graft.policy.policy_file import PolicyFile
from tests.e2e.conftest import _podman, container_root, podman
from tests.hostile.conftest import graft_without
from tests.hostile.test_eighth_reading_folders import holder, running
from tests.hostile.test_fifteenth_reading_listen import bundle, send_container
from tests.hostile.test_ninth_reading_splice import forget_names
from tests.hostile.test_twelfth_reading_attach import in_cgroup
from tests.hostile.test_twenty_fourth_reading import held_in_its_start
from tests.hostile.test_twenty_third_reading import policies
from tests.support.cgroups import new_cgroup
from tests.support.engines import Engine
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4
from tests.support.program import Program
from tests.support.puppet import puppet
from tests.support.wait import PATIENCE, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

__all__ = ["_podman", "container_root", "podman"]


def write(file: Path, ports: str, extra: str = "") -> None:
    rule = f"{{to: {CLIENT4}, ports: {ports}, endpoint: out}}"
    file.write_text(f"name: web\n{extra}endpoints: {{out: 0.0.0.0:dynamic}}\negress: [{rule}]\ndefault: deny\n")


@pytest.fixture
def saving(host: Host) -> Iterator[Host]:
    yield host.saving
    host.graft("down", "--force", "--forget", status=None)
    host.graft("up")


@pytest.mark.parametrize("is_attached", [False, True], ids=["first", "again"])
def test_who_prolongs_an_attach_does_not_keep_the_policy_of_before(
    saving: Host, tmp_path: Path, is_attached: bool
) -> None:
    file = tmp_path / "web.yaml"
    with saving.client.listener(CLIENT4) as listener, new_cgroup("there") as there, new_cgroup("evil") as evil:
        port = listener.getsockname()[1]
        write(file, f"[1, {port}]")
        for path in (there, evil) if is_attached else (there,):
            saving.graft("attach", "--cgroup", path, "--policy", file)
        with in_cgroup(saving, evil, *holder("self")):  # a process of the container's, as nobody
            attaching = saving.start_command([GRAFT, "attach", "--cgroup", evil, "--policy", file])
            time.sleep(2)  # it looks, for some seconds
            assert attaching.process.poll() is None
            write(file, "[1]")
            saving.graft("policy", "apply", file)
            attaching.wait(60)
        with puppet(evil, saving.netns.path) as one, puppet(there, saving.netns.path) as two:
            assert (one.connect(CLIENT4, port), two.connect(CLIENT4, port)) == ("EACCES", "EACCES")
        assert str(port) not in saving.graft("export").stdout
        for path in (there, evil):
            cgroup.kill(path)


def test_a_program_whose_start_waits_does_not_run_under_the_policy_of_before(host: Host, tmp_path: Path) -> None:
    file, top = tmp_path / "web.yaml", cgroup.v2_mount() / host.settings.cgroup
    with new_cgroup("there") as there:
        write(file, "[1, 7777]")
        host.graft("attach", "--cgroup", there, "--policy", file)
        with host.installation.transaction():  # which others can have last
            program = host.start("--policy", file, "--", "sleep", "1000")
            until("it is launched", lambda: any(cgroup.processes(one) for one in top.glob("run-*")), 20)
            write(file, "[1]")
            applying = host.start_command([GRAFT, "policy", "apply", file])
        assert applying.wait() == 0
        assert program.wait() != 0 and "has changed while the program started" in program.complained
        [one] = host.installation.containers.listing()
        assert "7777" not in host.graft("policy", "show", one.id).stdout
        host.remove_at(there)


def test_a_policy_that_waits_for_the_lock_is_applied_as_its_file_is_then(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    with new_cgroup("there") as there:
        write(file, "[1]")
        host.graft("attach", "--cgroup", there, "--policy", file)
        write(file, "[1, 7777]")
        with host.installation.transaction():
            applying = host.start_command([GRAFT, "policy", "apply", file])
            applying.until("it waits for the lock", lambda: str(host.settings.run_dir / "lock") in files_of(applying))
            write(file, "[1, 8888]")
        assert applying.wait() == 0
        [one] = host.installation.containers.listing()
        shown = host.graft("policy", "show", one.id).stdout
        assert "8888" in shown and "7777" not in shown
        host.remove_at(there)


def files_of(program: Program) -> set[str]:
    """The files that a process has open."""
    found = set()
    for one in Path(f"/proc/{program.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(str(one.readlink()))
    return found


def test_a_file_that_comes_first_now_is_another_policy(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    second.write_text("name: p\n")
    file = PolicyFile.of(second, (first,))
    assert file.is_unchanged
    first.write_text("name: p\n")
    assert not file.is_unchanged
    first.unlink()
    second.touch()
    assert not file.is_unchanged


@contextmanager
def everybody_may_list(folder: Path) -> Iterator[None]:
    """That folder, and those above it."""
    before = {one: one.stat().st_mode for one in (folder, *folder.parents) if one.is_relative_to("/tmp/pytest-of-root")}
    for one in before:
        one.chmod(0o755)
    yield
    for one, mode in before.items():
        one.chmod(mode)


@pytest.mark.parametrize("is_held", [False, True], ids=["control", ""])
def test_who_holds_the_folder_of_policies_does_not_stop_graft_listen(host: Host, tmp_path: Path, is_held: bool) -> None:
    folder, hostile = policies(host), tmp_path / "hostile"
    other = bundle(tmp_path / "other")
    hostile.mkdir()
    (hostile / "config.json").write_text(json.dumps({"process": {"env": [f"GRAFT_POLICY=nobody-knows-{os.getpid()}"]}}))
    serving = host.start_command([GRAFT, "listen"])
    serving.until("it listens", lambda: (host.settings.run_dir / "listener").is_socket())
    with ExitStack() as stack:
        stack.enter_context(everybody_may_list(folder))
        if is_held:
            stack.enter_context(running(holder(folder)))
        send_container(stack, host, "hostile", hostile)
        send_container(stack, host, "other", other)
        serving.says("other: attached", 40)
        serving.says("hostile: refused", 40)


@pytest.mark.parametrize("is_held", [False, True], ids=["control", ""])
def test_who_is_held_in_its_start_has_no_command_wait_for_its_policy(
    host: Host, podman: Engine, tmp_path: Path, is_held: bool
) -> None:
    file = policies(host) / "web.yaml"
    write(file, "[1]", "open: true\n")
    os.sync()
    with everybody_may_list(file.parent), ExitStack() as start:
        start.enter_context(held_in_its_start(host, podman, tmp_path, "GRAFT_POLICY=web"))
        with running(holder(file.parent)) if is_held else nullcontext():
            forget_names()
            goes_on = threading.Thread(target=start.close)
            goes_on.start()
            for number in range(10):
                host.graft("ep", "add", f"other{number}", f"127.0.0.1:{host.port()}", timeout=20)
        goes_on.join()
    podman.remove("evil")
    file.unlink()


@pytest.mark.parametrize("without", ["", "named namespaces apart"], ids=["", "control"])
def test_who_holds_the_folder_of_a_named_namespace_has_no_other_command_wait(
    host: Host, tmp_path: Path, without: str
) -> None:
    folder = tmp_path / "netns"
    folder.mkdir()
    (folder / "there").symlink_to(host.client.path)
    command = ["ep", "add", "there", "10.98.0.1:80", "--netns", str(folder / "there")]
    with everybody_may_list(folder), running(holder(folder)):
        forget_names()
        adding = host.start_command([*graft_without(without), *command])
        if without:
            adding.until("it has the lock", lambda: not is_free(host))
            with pytest.raises(subprocess.TimeoutExpired):
                host.graft("ep", "add", "other", f"127.0.0.1:{host.port()}", timeout=5)
        else:
            adding.process.wait(20 * PATIENCE)
            assert f"netns: {folder}/there: somebody holds the directory {folder}" in adding.complained
            host.graft("ep", "add", "other", f"127.0.0.1:{host.port()}", timeout=20)
    if not without:
        host.graft(*command)
        assert host.installation.endpoints.find("there").cookie == netns.cookie(host.client.path)


def is_free(host: Host) -> bool:
    """Whether nobody has the installation's lock."""
    with (host.settings.run_dir / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
