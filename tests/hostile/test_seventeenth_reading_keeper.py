"""What a seventeenth reading found about graftd and its keeper: a user of the host who holds a folder of theirs in
/proc kept graftd from coming back, or had it killed and left in the kernel, where `graft down` and `detach` stopped.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from graft.keeper import own_names
from graft.keeper.child import Child
from graft.kernel import cgroup
from graft.splice import control, daemon_process
from tests.hostile.conftest import graft_without
from tests.hostile.test_daemon_shares import served
from tests.hostile.test_eighth_reading_folders import running
from tests.hostile.test_fifteenth_reading_watcher import HOLDS_FOR_LONG, said
from tests.hostile.test_ninth_reading_splice import forget_names
from tests.hostile.test_sixteenth_reading_keeper import graftd, keeper, start_keeper
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.plain import Plain, plain
from tests.support.relayed import published
from tests.support.wait import PATIENCE, kill, until

pytestmark = pytest.mark.e2e
__all__ = ["start_keeper"]

_WATCHDOG_SECONDS = 9.0


@contextmanager
def held(folder: str) -> Iterator[None]:
    """A folder in /proc that a user of the host holds; the kernel has forgotten the names in it that nobody uses."""
    with running([sys.executable, "-c", HOLDS_FOR_LONG, folder, "0"]):
        forget_names()
        yield


# ---- who holds the keeper's folder


def test_graftd_comes_back_while_its_keepers_folder_is_held(host: Host) -> None:
    with plain(host) as container, container.listener() as listener:
        port = published(container)
        with held(f"/proc/{keeper(host)}"):
            for _ in range(3):
                before = graftd(host)
                kill(before)
                forget_names()
                assert served(container, listener, port, 10 * PATIENCE)
                assert graftd(host) != before
            container.host.graft("daemon", "--replace")
            assert served(container, listener, port, 10 * PATIENCE)


def test_control_one_that_looks_into_its_keepers_folder_waits_there(
    host: Host, start_keeper: Callable[[str], None]
) -> None:
    start_keeper("own folder")
    with plain(host) as container, container.listener() as listener:
        port = published(container)
        with held(f"/proc/{keeper(host)}"):
            kill(graftd(host))
            forget_names()
            assert not served(container, listener, port, 5.0)
        until("served again", lambda: served(container, listener, port, 1.0))


# ---- who holds graftd's own from the moment on in which it is made

STARTS_SLOWLY = """
import os
os.write(3, b"started")
os.read(4, 1)
os.stat("/proc/self/fd/3")
for name in ("mountinfo", f"task/{os.getpid()}/stat", f"task/{os.getpid()}/schedstat"):
    os.close(os.open(f"/proc/self/{name}", os.O_RDONLY))
os.write(3, b"done")
"""


def gets_on_while_held(folder: str) -> bool:
    """Whether a program in graftd's place gets at what graftd needs in /proc, while it is held from its start on."""
    says, started = os.pipe()
    go, may_go = os.pipe()
    child = Child([sys.executable, "-I", "-c", STARTS_SLOWLY], {}, [("says", started), ("go", go)])
    try:
        assert os.read(says, 100) == b"started"
        with held(folder.format(child.pid)):
            os.write(may_go, b"!")
            gets_on = bool(select.select([says], [], [], 3.0)[0])
        assert os.read(says, 100) == b"done"
        assert child.reap() == 0
        return gets_on
    finally:
        for fd in (says, started, go, may_go):
            os.close(fd)


FOLDERS = pytest.mark.parametrize("folder", ["/proc/{0}", "/proc/{0}/task", "/proc/{0}/task/{0}"])


@FOLDERS
def test_what_graftd_needs_of_its_folder_is_in_the_cache_before_anybody_sees_it(root: None, folder: str) -> None:
    assert gets_on_while_held(folder)


@pytest.mark.parametrize("folder", ["/proc/{0}", "/proc/{0}/task/{0}"])
def test_control_else_it_waits(root: None, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_names, "pin", lambda inherited=0: None)
    assert not gets_on_while_held(folder)


# ---- who holds graftd's own later


_UNPINNED = "from graft.keeper import own_names, process; own_names.pin = lambda inherited=0: None; "
WAITS_LONG, LEAVES_SOON = "process._END_SECONDS = 1000.0; ", "process._END_SECONDS = 0.5; "
"""How long the keeper waits for the end of a graftd that it killed, before it starts another one."""


@pytest.fixture
def served_by(bare_host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Plain]]:
    """A container to attach, on a host of its own, where graftd lacks a defence, and is killed soon if it hangs."""
    bare_host.graft("up")
    with ExitStack() as stack:

        def start(defence: str, waits: str = "") -> Plain:
            monkeypatch.setattr(daemon_process, "_WATCHDOG_SECONDS", _WATCHDOG_SECONDS)
            if defence:
                command = [*map(str, graft_without(defence)), "daemon"]
                monkeypatch.setattr(daemon_process, "graftd_command", lambda *_: command)
                boot = daemon_process._KEEPER.replace("sys.exit", f"{_UNPINNED}{waits}sys.exit")
                monkeypatch.setattr(daemon_process, "_KEEPER", boot)
            daemon_process.ensure_running(bare_host.settings)
            return stack.enter_context(plain(bare_host))

        yield start


@contextmanager
def hangs(host: Host) -> Iterator[None]:
    """Hold what graftd's watchdog asks about, for longer than graftd may say nothing."""
    pid = graftd(host)
    with held(f"/proc/{pid}/task/{pid}"):
        for _ in range(4):
            forget_names()
            time.sleep(1.0)
        time.sleep(_WATCHDOG_SECONDS)
        yield


def log_of(host: Host) -> str:
    """graftd's log."""
    return (host.settings.run_dir / "graftd.log").read_text()


@pytest.mark.timeout(200)
def test_graftd_says_that_it_works_while_its_own_folder_is_held(served_by: Callable[..., Plain]) -> None:
    container = served_by("")
    host = container.host
    with container.listener() as listener:
        port, before = published(container), graftd(host)
        with hangs(host):
            assert served(container, listener, port, 5 * PATIENCE)
            assert graftd(host) == before and "hangs" not in log_of(host)


@contextmanager
def cannot_end(container: Plain) -> Iterator[int]:
    """Have the graftd that serves a container hang and killed, and wait in the kernel; gives its process id. It looks
    its own folder up: this is also the control of the test before.
    """
    host, pid = container.host, graftd(container.host)
    with hangs(host):
        until("it was killed", lambda: f"graftd ({pid}) hangs, and is killed" in log_of(host))
        assert Path(f"/proc/{pid}/task").exists(), "it has not ended"
        yield pid


@pytest.mark.timeout(300)
def test_detach_goes_on_where_graftd_does_not_end(served_by: Callable[..., Plain]) -> None:
    container = served_by("open stat", WAITS_LONG)
    host = container.host
    with container.listener() as listener:
        port = published(container)
        assert served(container, listener, port, 5 * PATIENCE)
        with cannot_end(container):
            detached = host.graft("detach", "--cgroup", container.cgroup, status=8)
            assert "graftd may have its relays open: the daemon does not answer" in said(detached.stderr)
            assert_unserved(host, port)
        container.until_published(port, False)


@pytest.mark.timeout(300)
def test_detach_is_done_by_the_next_where_one_is_left_behind(served_by: Callable[..., Plain]) -> None:
    """The one that waits has its relays open still: to connect or to go on with a connection leads nowhere."""
    container = served_by("open stat", LEAVES_SOON)
    host = container.host
    with container.listener() as listener:
        port = published(container)
        with host.client.connected(HOST4, port, 10 * PATIENCE) as client:
            accepted, _ = listener.accept()
            with accepted, cannot_end(container) as pid:
                until("another one serves", lambda: graftd(host) not in (0, pid), timeout=30)
                host.graft("detach", "--cgroup", container.cgroup)
                assert_unserved(host, port)
                assert not gets_through(client, accepted)
        container.until_published(port, False)


def gets_through(sender: socket.socket, receiver: socket.socket) -> bool:
    """Whether what one sends is received by the other."""
    receiver.settimeout(1.0)
    try:
        sender.sendall(b"more")
        return receiver.recv(16) == b"more"
    except OSError:  # reset, or silent
        return False


def assert_unserved(host: Host, port: int) -> None:
    """No container is attached, and nobody is served at a port of the host's."""
    assert host.installation.containers.listing() == []
    with pytest.raises(OSError):  # refused, or nobody answers: the hooks drop what comes
        host.client.connected(HOST4, port, 1.0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("waits", [WAITS_LONG, LEAVES_SOON], ids=["waited-for", "left-behind"])
def test_down_goes_on_where_graftd_does_not_end(served_by: Callable[..., Plain], waits: str) -> None:
    container = served_by("open stat", waits)
    host = container.host
    published(container)
    with cannot_end(container) as pid:
        down = host.graft("down", "--force", status=6)
        assert f"killed processes wait in the kernel ({pid}" in said(down.stderr)
        assert not host.settings.pin_dir.exists() and not host.settings.run_dir.exists()
    until("it has ended", lambda: not cgroup.processes(host.cgroup / "relays"))
    host.graft("down")
    assert not host.cgroup.exists()


@pytest.mark.timeout(200)
def test_one_that_is_stopped_is_killed_by_down(served_by: Callable[..., Plain]) -> None:
    """With its keeper: nothing of both is left, and so nothing is wrong."""
    host = served_by("").host
    pids = (graftd(host), keeper(host))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    host.graft("down", "--force")
    assert not host.cgroup.exists() and not host.settings.run_dir.exists()
    assert control.ask(host.settings, {"do": "ping"}) is None
