"""What is saved outlives a reboot: restored, waited for, exported and imported; and what can go wrong with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from graft.commands import attach as attach_command
from graft.commands import detach as detach_command
from graft.commands import transfer
from graft.commands.attach import Seen, look_at
from graft.commands.restore import restore
from graft.commands.watcher import TRIES
from graft.kernel import cgroup
from graft.kernel.file_lock import locked_file
from graft.saved.model import SavedState
from graft.saved.store import Store
from graft.state import inventory, members
from graft.state.installation import Installation
from tests.e2e.conftest import WritePolicy
from tests.hostile.test_eighth_reading_folders import holder, running
from tests.support.cgroups import attach_points, new_cgroup
from tests.support.engines import Engine
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4, Netns
from tests.support.policies import one_endpoint
from tests.support.puppet import puppet
from tests.support.shell import run
from tests.support.wait import until

pytestmark = pytest.mark.e2e


@pytest.fixture
def saver(bare_host: Host) -> Iterator[Host]:
    """A host with Graft up that saves what commands change."""
    host = bare_host.saving
    host.graft("up")
    yield host
    host.stop_programs()
    host.graft("down", "--force", "--forget")


@pytest.fixture
def box() -> Iterator[Path]:
    """A cgroup for a container; a test may remove it and make it again."""
    with new_cgroup("box") as path:
        yield path


def watcher_of(host: Host) -> int:
    """The process id of the watcher, 0 if none runs."""
    return next(iter(cgroup.processes(host.cgroup / "watcher")), 0) if (host.cgroup / "watcher").exists() else 0


def reboot(host: Host, box: Path | None = None, comes_back: bool = True) -> None:
    """What a reboot does: no process, no cgroup, no pin and no file of /run is left. Then ``box`` is made again."""
    for path in (host.cgroup, *([box] if box else [])):
        if path.exists():
            cgroup.kill(path)
            cgroup.remove(path)
    for pin in (host.settings.run_dir / "netns").glob("*"):
        run(["umount", "-l", pin])
    run(["rm", "-rf", host.settings.pin_dir, host.settings.run_dir], status=0)
    if box and comes_back:
        box.mkdir()


def assert_confined(host: Host, path: Path, port: int) -> None:
    """A server in ``path`` that binds port 80 is reached at ``port`` with real packets; nothing else is permitted."""
    with puppet(path, host.netns.path) as server:
        listener = server.socket()
        for call in (["reuse", listener], ["bind", listener, "0.0.0.0", 80], ["listen", listener]):
            assert server.say(*call) == "ok", call
        assert server.say("name", listener) == ["0.0.0.0", 80]
        with host.client.connected(HOST4, port) as connection:
            server.say("answer", listener, "hello")
            assert connection.recv(100) == b"hello"
        assert server.bind("0.0.0.0", host.port()) == "EACCES"
        assert server.connect(HOST4, port) == "EACCES"
    assert not host.netns.listens(80)


def attached(host: Host, path: Path) -> bool:
    return any(one["cgroup"] == str(path) and one["state"] == "attached" for one in host.ps())


def confine(host: Host, path: Path, write_policy: WritePolicy) -> int:
    """`graft attach` with a policy file that grants one port. Returns the endpoint's port."""
    port = host.port()
    host.graft("ep", "add", "web", f"0.0.0.0:{port}")
    file = write_policy(one_endpoint("web"))
    host.graft("attach", "--cgroup", path, "--policy", file)
    file.unlink()  # its content is saved, not its path
    return port


def test_after_down_and_up_the_same_policy_is_enforced(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    port = confine(saver, box, write_policy)
    assert_confined(saver, box, port)
    saver.graft("down")
    assert attach_points(box) == set() and watcher_of(saver) == 0
    said = saver.graft("up")
    assert said.stderr == ""
    assert_confined(saver, box, port)
    assert [one["name"] for one in saver.ps()] == [str(box.relative_to(cgroup.v2_mount()))]


@pytest.fixture
def unlocked(saver: Host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The looks at containers in this process, each of which fails where the lock on what is saved is held."""
    looks: list[str] = []

    def checked(look: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*given: object) -> object:
            with locked_file(saver.settings.state_dir / "saved.lock", 5):  # the watcher has it for a moment
                looks.append(look.__name__)
            return look(*given)

        return wrapped

    for module, name in (
        (members, "inside"),
        (members, "of_each"),
        (members, "pinned"),
        (inventory, "host_sockets_of"),
        (inventory, "host_stack"),
        (detach_command, "withdraw"),
        (transfer, "withdraw"),
    ):
        monkeypatch.setattr(module, name, checked(getattr(module, name)))
    return looks


def test_a_container_that_prolongs_a_look_has_nobody_wait_for_the_lock(
    saver: Host, box: Path, write_policy: WritePolicy, unlocked: list[str]
) -> None:
    confine(saver, box, write_policy)
    policy = Store(saver.settings).read()[0].attachments[0].policy
    with Installation(saver.settings) as graft:
        detach_command.detach(graft, str(box), save=True)
        attach_command.attach(graft, str(box), policy, save=True)
        detach_command.detach(graft, str(box), save=False)
        Store(saver.settings).resume_all()
        restore(graft)
    assert attached(saver, box)
    transfer.import_state(saver.settings, SavedState())
    assert not attached(saver, box)
    assert {"inside", "host_sockets_of", "pinned", "host_stack", "withdraw"} <= set(unlocked)


def test_what_changes_between_the_look_and_the_lock_is_looked_at_again(
    saver: Host, box: Path, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    confine(saver, box, write_policy)
    policy = Store(saver.settings).read()[0].attachments[0].policy
    saver.graft("detach", "--cgroup", box)
    file, looks = write_policy(one_endpoint("web")), []

    def look(*given: Any) -> Seen:
        seen = look_at(*given)
        looks.append(seen.attached is not None)
        if len(looks) == 1:
            saver.graft("attach", "--cgroup", box, "--policy", file)
        return seen

    monkeypatch.setattr(attach_command, "look_at", look)
    with Installation(saver.settings) as graft:
        assert attach_command.attach(graft, str(box), policy).replaced
    assert looks == [False, True]
    assert len(saver.ps()) == 1


def test_after_a_reboot_a_container_waits_and_is_attached_when_it_appears(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    port = confine(saver, box, write_policy)
    reboot(saver, box, comes_back=False)
    name = str(box.relative_to(cgroup.v2_mount()))
    assert f"cgroup:{name} waits: it is not running" in saver.graft("up").stderr
    [waiting] = saver.ps()
    assert {key: waiting[key] for key in ("state", "name", "policy", "endpoints", "cgroup", "waits")} == {
        "state": "waiting",
        "name": name,
        "policy": "confined",
        "endpoints": ["web"],
        "cgroup": None,
        "waits": "it is not running",
    }
    assert "waiting: it is not running" in saver.graft("ps").stdout
    box.mkdir()
    until("the hooks are attached", lambda: attach_points(box))
    until("it is attached", lambda: attached(saver, box))
    assert_confined(saver, box, port)
    cgroup.remove(box)
    assert [one["state"] for one in saver.ps()] == ["waiting"]
    box.mkdir()
    until("it is attached again", lambda: attached(saver, box))
    assert_confined(saver, box, port)


def test_a_cgroup_deep_in_folders_that_are_not_there_either_is_attached(saver: Host, box: Path) -> None:
    inner = box / "one" / "two"
    inner.mkdir(parents=True)
    saver.graft("ep", "add", "web", f"0.0.0.0:{saver.port()}")
    saver.graft("attach", "--cgroup", inner, "-i", "*:80=web")
    reboot(saver, box, comes_back=False)
    saver.graft("up")
    time.sleep(TRIES[-1] + 2)  # by then it tries no more of its own accord
    for path in (box, inner.parent, inner):
        path.mkdir()
    until("it is attached", lambda: attached(saver, inner))


def test_whatever_command_is_the_first_after_a_reboot_restores(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    port = confine(saver, box, write_policy)
    reboot(saver, box)
    assert "web" in saver.graft("ep", "show").stdout
    assert_confined(saver, box, port)


def test_a_container_with_a_namespace_of_its_own_is_relayed_again_when_it_appears(
    saver: Host, box: Path, netns: Callable[[], Netns]
) -> None:
    port = saver.port()
    saver.graft("ep", "add", "web", f"0.0.0.0:{port}")
    with puppet(box, netns().path):
        assert "transport splice" in saver.graft("attach", "--cgroup", box, "-i", "*:80=web").stdout
    reboot(saver, box, comes_back=False)
    saver.graft("up")
    box.mkdir()
    time.sleep(0.2)
    assert not attached(saver, box), "an empty cgroup: it is not known yet to be in its own namespace"
    with puppet(box, netns().path) as server:
        number = server.listener("0.0.0.0", 80)
        until("it is attached", lambda: attached(saver, box))
        assert [one["transport"] for one in saver.ps()] == ["splice"]
        connection = until("it is relayed", lambda: _connected(saver, port))
        assert connection is not None
        with connection:
            server.say("answer", number, "relayed")
            assert connection.recv(100) == b"relayed"


def _connected(host: Host, port: int) -> socket.socket | None:
    try:
        return host.client.connected(HOST4, port)
    except OSError:
        return None


def test_a_damaged_file_is_set_aside_and_the_rest_is_restored(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    port = confine(saver, box, write_policy)
    saver.graft("ep", "add", "other", "127.0.0.1:dynamic")
    reboot(saver, box)
    path = saver.settings.state_dir / "saved" / "endpoints" / "other"
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 4
    path.write_bytes(raw)
    [line] = saver.graft("up").stderr.splitlines()
    aside = saver.settings.state_dir / "set-aside" / "endpoints-other.1"
    assert line == f"graft: {path}: damaged: the checksum is wrong; set aside as {aside}"
    assert aside.read_bytes() == raw
    assert "other" not in saver.graft("ep", "show").stdout
    assert_confined(saver, box, port)
    assert saver.graft("up").stderr == ""


def test_a_container_whose_endpoint_was_lost_says_so_and_is_attached_when_it_is_there(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    port = confine(saver, box, write_policy)
    reboot(saver, box)
    (saver.settings.state_dir / "saved" / "endpoints" / "web").unlink()
    assert "endpoint 'web' not found" in saver.graft("up").stderr
    assert "endpoint 'web' not found" in saver.ps()[0]["waits"]
    saver.graft("ep", "add", "web", f"0.0.0.0:{port}")
    until("it is attached", lambda: attached(saver, box))
    assert_confined(saver, box, port)


def test_what_others_can_write_is_not_restored(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    confine(saver, box, write_policy)
    reboot(saver, box)
    folder = saver.settings.state_dir / "saved" / "attachments"
    folder.chmod(0o777)
    assert "others can write it; nothing that is saved was read" in saver.graft("up", status=7).stderr
    assert attach_points(box) == set()
    folder.chmod(0o700)
    saver.graft("up")
    assert attached(saver, box)


def test_a_container_that_waits_can_be_detached(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    confine(saver, box, write_policy)
    cgroup.remove(box)
    assert [one["state"] for one in saver.ps()] == ["waiting"]
    said = saver.graft("detach", "--cgroup", box).stdout
    assert said == f"cgroup:{box.relative_to(cgroup.v2_mount())}: not waited for any more\n"
    assert saver.ps() == []
    until("nothing is left to watch for", lambda: watcher_of(saver) == 0, 30)
    box.mkdir()
    saver.graft("up")
    assert saver.ps() == [] and attach_points(box) == set()


def test_a_detached_container_is_not_attached_again(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    confine(saver, box, write_policy)
    saver.graft("detach", "--cgroup", box)
    saver.graft("ep", "del", "web")
    reboot(saver, box)
    saver.graft("up")
    assert saver.ps() == [] and saver.graft("ep", "show").stdout == ""


def test_a_deleted_endpoint_that_was_not_restored_can_be_deleted(saver: Host, netns: Callable[[], Netns]) -> None:
    inside = netns()
    saver.graft("ep", "add", "far", "0.0.0.0:80", "--netns", inside.path)
    run(["ip", "netns", "del", inside.path.name], status=0)
    reboot(saver)
    assert "endpoint far: not restored" in saver.graft("up").stderr
    saver.graft("ep", "del", "far")
    assert saver.graft("up").stderr == ""
    run(["ip", "netns", "add", inside.path.name], status=0)


def test_an_endpoint_in_a_processs_namespace_is_not_saved_and_that_is_said(saver: Host) -> None:
    said = saver.graft("ep", "add", "mine", "0.0.0.0:80", "--netns", os.getpid())
    assert "mine is not saved for the next boot: its namespace is that of a process" in said.stderr
    assert Store(saver.settings).read()[0].endpoints == ()


def test_no_save_lasts_until_the_next_boot(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    port = confine(saver, box, write_policy)
    before = saver.graft("export").stdout
    saver.graft("ep", "add", "--no-save", "short", "127.0.0.1:1")
    saver.graft("ep", "set", "--no-save", "web", "0.0.0.0:1")
    saver.graft("policy", "apply", "--no-save", write_policy("name: confined\n"))
    with new_cgroup("short") as other:
        saver.graft("attach", "--no-save", "--cgroup", other, "-i", "*:80=short")
        assert saver.graft("export").stdout == before
    saver.graft("ep", "del", "--no-save", "--force", "web")
    saver.graft("detach", "--no-save", "--cgroup", box)
    assert saver.graft("export").stdout == before
    saver.graft("up")
    time.sleep(0.5)
    assert saver.ps() == [] and "web" not in saver.graft("ep", "show").stdout, "not before the next boot"
    reboot(saver, box)
    saver.graft("up")
    assert saver.graft("ep", "show").stdout.split()[:2] == ["web", f"0.0.0.0:{port}"]
    assert_confined(saver, box, port)


def test_programs_of_graft_run_are_not_saved(saver: Host) -> None:
    saver.graft("ep", "add", "web", f"0.0.0.0:{saver.port()}")
    program = saver.start("-i", "0.0.0.0:80=web", "--", "sleep", "60")
    program.until("it runs", lambda: saver.installation.containers.listing())
    [container] = saver.installation.containers.listing()
    saver.graft("attach", "--cgroup", container.name, "-i", "0.0.0.0:81=web")
    assert Store(saver.settings).read()[0].attachments == ()


def test_a_policy_applied_by_name_is_saved_for_those_that_wait_too(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    port = confine(saver, box, write_policy)
    cgroup.remove(box)
    said = saver.graft("policy", "apply", write_policy(one_endpoint("web", "0.0.0.0:81"))).stdout
    assert said == f"cgroup:{box.relative_to(cgroup.v2_mount())}: policy confined, when it is there\n"
    box.mkdir()
    until("it is attached", lambda: attached(saver, box))
    with puppet(box, saver.netns.path) as server:
        assert server.bind("0.0.0.0", 80) == "EACCES"
        assert server.bind("0.0.0.0", 81) == "ok"
    assert port


def test_a_unix_endpoint_and_one_with_groups_come_back_as_they_were(saver: Host, tmp_path: Path) -> None:
    saver.graft("ep", "add", "app", f"unix:{tmp_path}/app.sock", "--owner", "nobody", "--mode", "0600", "--open")
    saver.graft("ep", "add", "many", "0.0.0.0:5353", "--proto", "udp", "--multicast", "239.1.1.1")
    saver.graft("ep", "add", "some", "[::]:20000-20009", "--dual-stack")
    saver.graft("ep", "add", "out4", "0.0.0.0:dynamic")
    before = saver.graft("ep", "show", "--json").stdout
    reboot(saver)
    saver.graft("up")
    assert saver.graft("ep", "show", "--json").stdout == before


def test_down_forgets_only_when_asked(saver: Host) -> None:
    saver.graft("ep", "add", "web", "0.0.0.0:80")
    saver.graft("down")
    saver.graft("up")
    assert "web" in saver.graft("ep", "show").stdout
    saver.graft("down", "--forget")
    saver.graft("up")
    assert saver.graft("ep", "show").stdout == ""


# ---- export and import ------------------------------------------------------------------------------


def test_an_export_is_imported_on_an_empty_machine(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    port = confine(saver, box, write_policy)
    file = tmp_path / "all.yaml"
    saver.graft("export", file)
    assert file.stat().st_mode & 0o077 == 0
    saver.graft("down", "--forget")
    assert saver.graft("import", "--check", file).stdout.endswith("ok (1 endpoints, 1 containers)\n")
    assert saver.graft("ep", "show").stdout == ""
    name = f"cgroup:{box.relative_to(cgroup.v2_mount())}"
    assert saver.graft("import", file).stdout.splitlines() == ["endpoints made: web", f"attached: {name}"]
    assert_confined(saver, box, port)
    assert saver.graft("export").stdout == file.read_text()
    assert saver.graft("import", file).stdout == "nothing to change\n"


def test_an_import_changes_what_differs_and_takes_away_what_is_not_in_it(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    port, moved = confine(saver, box, write_policy), saver.port()
    saver.graft("ep", "add", "other", "127.0.0.1:dynamic")
    file = tmp_path / "all.yaml"
    with new_cgroup("other") as other:
        saver.graft("attach", "--cgroup", other, "-e", "127.0.0.0/8=other")
        name = other.relative_to(cgroup.v2_mount())
        text = saver.graft("export").stdout
        kept = text.replace(str(port), str(moved)).replace("  other: 127.0.0.1:dynamic\n", "")
        start = kept.index(f"- container: cgroup:{name}")
        end = kept.find("- container:", start + 1)
        file.write_text(kept[:start] + (kept[end:] if end > 0 else ""))
        assert saver.graft("import", file).stdout.splitlines() == [
            "endpoints changed: web",
            "endpoints deleted: other",
            f"detached: {name}",
        ]
        assert attach_points(other) == set()
        assert_confined(saver, box, moved)
        file.write_text(text)
        said = saver.graft("import", file).stdout.splitlines()
        assert said == ["endpoints made: other", "endpoints changed: web", f"attached: cgroup:{name}"]
        assert attached(saver, other)
        assert_confined(saver, box, port)


def test_an_import_that_fails_changes_nothing(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    port = confine(saver, box, write_policy)
    text, file = saver.graft("export").stdout, tmp_path / "all.yaml"
    # A new endpoint is made first, then the next one cannot be changed to another family: a rule uses it.
    file.write_text(text.replace(f"  web: 0.0.0.0:{port}\n", f"  aaa: 0.0.0.0:1\n  web: '[::]:{port}'\n"))
    assert "IPv4" in saver.graft("import", file, status=2).stderr, "found by the check"
    ending = f"attachments: []\nendpoints:\n  aaa: 0.0.0.0:1\n  web: '[::]:{port}'\n"
    file.write_text("version: 1\n" + ending)
    assert "rules in force use 'web' as an IPv4 endpoint" in saver.graft("import", file, status=4).stderr
    assert saver.graft("export").stdout == text
    assert saver.graft("ep", "show").stdout.split()[:2] == ["web", f"0.0.0.0:{port}"]
    assert_confined(saver, box, port)


def test_an_import_does_not_take_an_endpoint_from_a_program_that_uses_it(saver: Host, tmp_path: Path) -> None:
    saver.graft("ep", "add", "web", f"0.0.0.0:{saver.port()}")
    program = saver.start("-i", "0.0.0.0:80=web", "--", "sleep", "60")
    program.until("it runs", lambda: saver.installation.containers.listing())
    file = tmp_path / "none.yaml"
    file.write_text("version: 1\n")
    assert "sleep uses web, which the file does not have" in saver.graft("import", file, status=4).stderr
    assert "web" in saver.graft("ep", "show").stdout


# ---- what breaks ------------------------------------------------------------------------------------


@contextmanager
def _tiny_disk(path: Path) -> Iterator[Callable[[], None]]:
    """A file system at ``path`` that is full; gives what makes room on it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", path], status=0)
    try:
        with (path / "filler").open("wb") as file:
            while True:
                try:
                    os.write(file.fileno(), bytes(4096))
                except OSError:
                    break
        yield lambda: (path / "filler").unlink()
    finally:
        run(["umount", "-l", path], status=0)


def test_on_a_full_disk_a_command_says_so_and_changes_nothing(bare_host: Host, box: Path) -> None:
    host = bare_host.saving
    with _tiny_disk(host.settings.state_dir) as make_room:
        said = host.graft("ep", "add", "web", "0.0.0.0:80", status=6).stderr
        assert "No space left on device; nothing was changed (--no-save changes it for this boot)" in said
        assert host.graft("ep", "show").stdout == ""
        host.graft("ep", "add", "--no-save", "web", "0.0.0.0:80")
        said = host.graft("attach", "--cgroup", box, "-i", "*:80=web", status=6).stderr
        assert "No space left on device; nothing was changed" in said
        assert attach_points(box) == set() and host.ps() == []
        make_room()
        host.graft("attach", "--cgroup", box, "-i", "*:80=web")
        assert attached(host, box)
        host.graft("down", "--forget")


def test_a_command_killed_at_any_moment_leaves_a_whole_file(saver: Host) -> None:
    saver.graft("ep", "add", "web", "0.0.0.0:1")
    path = saver.settings.state_dir / "saved" / "endpoints" / "web"
    seen = set()
    for round_ in range(12):
        started = subprocess.Popen(
            [GRAFT, "ep", "set", "web", f"0.0.0.0:{1000 + round_}"],
            env={**os.environ, **saver.environment},
            stderr=subprocess.DEVNULL,
        )
        # Killed as soon as the temporary file is there, or after a while: before, in and after the write.
        deadline = time.monotonic() + 0.05 * round_ + 0.1
        while time.monotonic() < deadline and started.poll() is None and not list(path.parent.glob(".web.*")):
            pass
        started.send_signal(signal.SIGKILL)
        started.wait()
        state, bad = Store(saver.settings).read()
        assert bad == []
        seen.add(state.endpoints[0].port)
        assert (saver.settings.state_dir / "set-aside").exists() is False
    reboot(saver)
    assert saver.graft("up").stderr == ""
    assert seen <= {1, *range(1000, 1012)}
    assert not list(path.parent.glob(".*")), "what killed commands left is removed"


def test_where_bpffs_is_gone_the_policy_stays_in_force_all_the_time(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    port = confine(saver, box, write_policy)
    points = attach_points(box)
    with puppet(box, saver.netns.path) as server, ExitStack() as stack:
        listener = stack.enter_context(saver.netns.listener(HOST4))
        where = listener.getsockname()
        results: set[str] = set()
        stop = threading.Event()

        def try_always() -> None:
            while not stop.is_set():
                number = server.socket()
                results.add(str(server.say("connect", number, *where)))
                server.say("close", number)

        thread = threading.Thread(target=try_always)
        thread.start()
        try:
            run(["rm", "-rf", saver.settings.pin_dir], status=0)  # as if it were unmounted
            saver.graft("up")
            assert attached(saver, box)
        finally:
            stop.set()
            thread.join()
        assert results == {"EACCES"}, "at no moment was it permitted"
    assert attach_points(box) == points
    assert_confined(saver, box, port)
    shown = run(["bpftool", "cgroup", "show", box], status=None).stdout if os.path.exists("/usr/sbin/bpftool") else ""
    assert shown.count("graft_bind4") in (0, 1)
    saver.graft("down")
    assert attach_points(box) == set()


def test_where_bpffs_is_gone_an_unsaved_container_stays_confined_until_it_is_attached_again(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    file = write_policy("name: nothing\ndefault: deny\n")
    saver.graft("attach", "--no-save", "--cgroup", box, "--policy", file)
    run(["rm", "-rf", saver.settings.pin_dir], status=0)
    saver.graft("up")
    assert saver.ps() == []
    with puppet(box, saver.netns.path) as program:
        assert program.bind("0.0.0.0", saver.port()) == "EACCES"
    saver.graft("attach", "--no-save", "--cgroup", box, "--policy", file)
    assert attached(saver, box)
    with puppet(box, saver.netns.path) as program:
        assert program.bind("0.0.0.0", saver.port()) == "EACCES"
    run(["rm", "-rf", saver.settings.pin_dir], status=0)
    saver.graft("up")
    saver.graft("down")
    assert attach_points(box) == set(), "down finds them too"


def test_a_watcher_that_was_killed_is_started_by_up(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    port = confine(saver, box, write_policy)
    pid = until("the watcher runs", lambda: watcher_of(saver))
    os.kill(pid, signal.SIGKILL)
    until("it has ended", lambda: watcher_of(saver) != pid)
    cgroup.remove(box)
    assert "nobody watches" in saver.graft("ps").stderr
    saver.graft("up")
    box.mkdir()
    until("it is attached", lambda: attached(saver, box))
    assert_confined(saver, box, port)


# ---- engines ----------------------------------------------------------------------------------------


def test_a_container_of_an_engine_gets_its_policy_again_under_its_name(host: Host, plain_engine: Engine) -> None:
    saving, engine = host.saving, plain_engine
    port = host.port()
    try:
        saving.graft("ep", "add", "web", f"0.0.0.0:{port}")
        engine.started("again", [], "sleep", "600", network="host")
        saving.graft("attach", "--cgroup", f"{engine.name}:again", "-i", "0.0.0.0:80=web")
        ids = {saving.ps()[0]["cgroup"]}
        for recreated in (False, True):
            if recreated:
                engine.remove("again")
                engine.started("again", [], "sleep", "600", network="host")
            else:
                engine("restart", "-t", "0", "again")
            until("it is attached", lambda: [one["state"] for one in saving.ps()] == ["attached"])
            ids.add(saving.ps()[0]["cgroup"])
            engine("exec", "again", "sh", "-c", "mkdir -p /tmp/w && echo again > /tmp/w/index.html")
            engine("exec", "-d", "again", "httpd", "-f", "-p", "0.0.0.0:80", "-h", "/tmp/w")
            until("it listens", lambda: host.netns.listens(port))
            assert host.client.fetch(HOST4, port).strip() == "again"
        assert len(ids) == 2, "the second has another id"
        assert saving.ps()[0]["engine"] == engine.name
    finally:
        engine.remove_all()
        Store(saving.settings).forget_all()
        until("the watcher ends", lambda: watcher_of(host) == 0, 30)


@contextmanager
def waiting_for(host: Host, engine: Engine, name: str) -> Iterator[Host]:
    """A host that has a policy saved for a container, which was removed."""
    saving = host.saving
    try:
        saving.graft("ep", "add", "web", f"0.0.0.0:{host.port()}")
        engine.started(name, [], "sleep", "600", network="host")
        saving.graft("attach", "--cgroup", f"{engine.name}:{name}", "-i", "0.0.0.0:80=web")
        engine.remove(name)
        until("it waits", lambda: [one["state"] for one in saving.ps()] == ["waiting"])
        yield saving
    finally:
        engine.remove_all()
        Store(saving.settings).forget_all()
        until("the watcher ends", lambda: watcher_of(host) == 0, 30)


def test_a_container_whose_id_begins_as_a_saved_name_does_not_get_its_policy(host: Host, plain_engine: Engine) -> None:
    engine, sleeps = plain_engine, ("sleep", "600")
    made = engine("create", "--name", "stranger", "--network", "host", *engine.run_flags, *engine.image, *sleeps)
    name = made.stdout.split()[-1][:4]
    with waiting_for(host, engine, name) as saving:
        engine("start", "stranger")
        with Installation(saving.settings) as graft:
            done = restore(graft)
        assert (done.attached, done.waiting) == ([], {f"{engine.name}:{name}": "it is not running"})
        number = engine.started(name, [], *sleeps, network="host")
        until("it is attached", lambda: [one["state"] for one in saving.ps()] == ["attached"])
        assert number in saving.ps()[0]["cgroup"]


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
def test_a_container_is_attached_while_somebody_holds_another_engines_folder(host: Host, plain_engine: Engine) -> None:
    engine, folder = plain_engine, cgroup.v2_mount() / "machine.slice"
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        with waiting_for(host, engine, "shop") as saving, running(holder(folder)):
            engine.started("shop", [], "sleep", "600", network="host")
            until("it is attached", lambda: [one["state"] for one in saving.ps()] == ["attached"], 45)
    finally:
        if made:
            folder.rmdir()
