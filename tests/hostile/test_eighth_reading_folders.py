"""What an eighth reading found about folders of the kernel that a container may list: cgroups, /proc/PID.

Who may list a folder holds its lock for as long as he likes, by getdents64(2) into a page that never comes; and with a
second thread that waits to make a file there, nobody else can list it or look up what is not cached.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from graft.kernel import cgroup
from graft.splice import client as splice
from graft.splice import control
from tests.hostile.test_daemon_shares import StartDaemon, served, start_daemon
from tests.support.holding import NOBODY_WITH_A_PAGE
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4
from tests.support.plain import Plain, plain
from tests.support.relayed import published
from tests.support.shell import Word
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e
__all__ = ["start_daemon"]

HOLDER = (
    NOBODY_WITH_A_PAGE
    + r"""
libc.prctl(4, 1, 0, 0, 0)
path = f"/proc/{os.getpid()}" if sys.argv[1] == "self" else sys.argv[1]
times = int(sys.argv[2])
fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
watch = libc.inotify_init()
libc.inotify_add_watch(watch, path.encode(), 0x30 | 0x01000000)  # IN_CLOSE, IN_ONLYDIR

def hold(wait):
    threading.Thread(target=libc.syscall, args=(217, fd, ctypes.c_void_p(at), 4096), daemon=True).start()
    time.sleep(wait)
    try:
        os.open(path + "/x", os.O_CREAT | os.O_RDONLY)
    except OSError:
        pass

if not times:
    threading.Thread(target=hold, args=(0.2,), daemon=True).start()
    time.sleep(0.5)
print("holds", flush=True)
seen = 0
while seen < times:  # until somebody has listed it as often as that
    raw, start = os.read(watch, 4096), 0
    while start < len(raw):
        _, mask, _, length = struct.unpack_from("iIII", raw, start)
        start += 16 + length
        seen += bool(mask & 0x10)
if times:
    hold(0.0005)
signal.pause()
"""
)

LISTENS_WHEN_TOLD = """
import socket, sys
print("ready", flush=True)
sys.stdin.readline()
sock = socket.create_server(("0.0.0.0", 81))
print("listens", flush=True)
sys.stdin.readline()
"""


def holder(path: Word, times: int = 0) -> list[Word]:
    """The user nobody holds a folder: at once, or when it has been listed so many times."""
    return [sys.executable, "-c", HOLDER, path, times]


@contextlib.contextmanager
def running(command: Sequence[Word], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    words, environ = list(map(str, command)), {**os.environ, **(environment or {})}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=environ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line in ("holds\n", "ready\n"), line
            yield process
        finally:
            process.kill()


def in_cgroup(container: Plain, below: str, *words: Word) -> list[str]:
    """A command that runs in a cgroup of the container below its own."""
    enter = f'echo $$ > {container.cgroup}/{below}/cgroup.procs; exec "$@"'
    return ["sh", "-c", enter, "sh", *container.netns.command(*words)]


def took(start: float) -> float:
    return time.monotonic() - start


# ---- graftd -----------------------------------------------------------------------------------------


@pytest.fixture
def pair(host: Host, start_daemon: StartDaemon) -> Iterator[tuple[Plain, Plain, socket.socket, int]]:
    """A hostile container and another one, which graftd serves; the other's listener, and its endpoint's port."""
    start_daemon()
    with plain(host) as hostile, plain(host) as other, hostile.listener(), other.listener(port=80) as listener:
        port, _ = published(other), published(hostile)
        assert served(other, listener, port, 15 * PATIENCE)
        yield hostile, other, listener, port


Pair = tuple[Plain, Plain, socket.socket, int]


@pytest.mark.parametrize("is_held", [False, True])
def test_the_daemon_serves_others_while_a_container_holds_its_cgroups_folder(pair: Pair, is_held: bool) -> None:
    """Without that, it publishes what listens in a cgroup that the container has made."""
    hostile, other, listener, port = pair
    host = hostile.host
    (hostile.cgroup / "sub").mkdir()
    more = host.port()
    hostile.attach(
        *("-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{host.port()}')}"),
        *("-i", f"0.0.0.0:81={host.endpoint(f'0.0.0.0:{more}')}"),
    )
    holding = running(hostile.command(*holder(hostile.cgroup))) if is_held else contextlib.nullcontext()
    with running(in_cgroup(hostile, "sub", sys.executable, "-c", LISTENS_WHEN_TOLD)) as program, holding:
        assert program.stdin is not None and program.stdout is not None
        program.stdin.write("\n")
        program.stdin.flush()
        assert program.stdout.readline() == "listens\n"
        if not is_held:
            hostile.until_published(more)
        for _ in range(4):
            assert served(other, listener, port, 4 * PATIENCE)
            time.sleep(0.5)
        if is_held:
            until("the container's problem is shown", lambda: "holds" in hostile.described().get("problem", ""))
            shown = host.graft("ps", timeout=20 * PATIENCE).stdout
            assert "holds the directory" in shown.replace("\n", " ")
            one = next(one for one in host.ps() if one["cgroup"] == str(hostile.cgroup))
            assert one["processes"] is None
            assert host.ps_of(other.cgroup)["processes"] == 1
    hostile.until_published(more, False)


def test_the_daemon_starts_while_a_process_holds_its_folder_in_proc(host: Host, pair: Pair) -> None:
    hostile, other, listener, port = pair
    with running(hostile.command(*holder("self"))):
        hostile.process.kill()  # the holder is the only process that is left in the container
        hostile.process.wait()
        splice.stop(host.settings)
        daemon = host.start_command([GRAFT, "daemon"])
        daemon.until("the daemon answers", lambda: control.ask(host.settings, {"do": "ping"}))
        other.until_published(port)
        assert served(other, listener, port, 4 * PATIENCE)
        assert {one["processes"] for one in host.ps()} == {1}
        daemon.process.terminate()
        assert daemon.process.wait(10 * PATIENCE) == 0


def test_the_daemon_starts_while_a_container_holds_its_cgroups_folder(host: Host, pair: Pair) -> None:
    hostile, other, listener, port = pair
    with running(hostile.command(*holder(hostile.cgroup))):
        splice.stop(host.settings)
        daemon = host.start_command([GRAFT, "daemon"])
        daemon.until("the daemon answers", lambda: control.ask(host.settings, {"do": "ping"}))
        other.until_published(port)
        assert served(other, listener, port, 4 * PATIENCE)
        daemon.process.kill()
        daemon.process.wait(10 * PATIENCE)


def test_the_daemon_sees_that_a_cgroup_is_gone_while_the_folder_above_is_held(host: Host, pair: Pair) -> None:
    hostile, other, listener, port = pair
    above = cgroup.v2_mount() / f"graft-test-{os.getpid()}-above"
    (above / "below").mkdir(parents=True)
    enter = f'echo $$ > {above}/below/cgroup.procs; exec "$@"'
    daemon = other.daemon()
    try:
        with subprocess.Popen(["sh", "-c", enter, "sh", *hostile.netns.command("sleep", "100")]) as process:
            until("it is in there", lambda: cgroup.processes(above))
            rules = ["-i", f"0.0.0.0:82={host.endpoint(f'0.0.0.0:{host.port()}')}"]
            host.graft("attach", "--cgroup", above / "below", *rules)
            process.kill()
        os.kill(daemon, signal.SIGSTOP)
        cgroup.remove(above / "below")
        with running(holder(above)):
            os.kill(daemon, signal.SIGCONT)
            for _ in range(3):
                assert served(other, listener, port, 4 * PATIENCE)
                time.sleep(0.3)
            until("its record is gone", lambda: len(host.installation.containers.listing()) == 2)
    finally:
        os.kill(daemon, signal.SIGCONT)
        cgroup.remove(above)


# ---- commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["cgroup", "self"])
def test_commands_end_while_a_container_holds_a_folder(host: Host, what: str) -> None:
    with plain(host) as hostile, plain(host) as other, hostile.listener():
        port = published(hostile)
        name = host.endpoint(f"0.0.0.0:{host.port()}")
        with running(hostile.command(*holder(hostile.cgroup if what == "cgroup" else "self"))):
            start = time.monotonic()
            assert len(host.ps()) == 1
            other.attach("-i", f"0.0.0.0:80={name}")
            host.graft("policy", "show", hostile.cgroup, status=None)
            host.graft("detach", "--cgroup", hostile.cgroup)
            assert not hostile.is_published(port)
            refused = host.graft("attach", "--cgroup", hostile.cgroup, "-i", f"0.0.0.0:80={name}", status=None)
            if what == "cgroup":
                assert "holds the directory" in refused.stderr.replace("\n", " ")
                assert refused.returncode != 0
            assert took(start) < 40 * PATIENCE


def test_detach_closes_what_a_container_has_while_it_holds_its_cgroups_folder(host: Host) -> None:
    """A direct container: by the tags of its sockets, wherever they are."""
    path = cgroup.v2_mount() / f"graft-test-{os.getpid()}-held"
    path.mkdir()
    port = host.port()
    enter = f'echo $$ > {path}/cgroup.procs; exec "$@"'
    try:
        in_it = ["sh", "-c", enter, "sh", *host.netns.command(sys.executable, "-c")]
        attached = running([*in_it, f"import sys; print('ready', flush=True)\nsys.stdin.readline()\n{SERVES}", port])
        with attached as program:
            host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:{port}={host.endpoint(f'{HOST4}:{port}')}")
            assert program.stdin is not None and program.stdout is not None
            program.stdin.write("\n")
            program.stdin.flush()
            assert program.stdout.readline() == "serves\n"
            with (
                host.client.connected(HOST4, port) as client,
                running(["sh", "-c", enter, "sh", *map(str, holder(path))]),
            ):
                client.settimeout(15 * PATIENCE)
                client.sendall(b"a")
                assert client.recv(10) == b"a"
                host.graft("detach", "--cgroup", path, timeout=40 * PATIENCE, status=None)
                try:
                    client.sendall(b"b")
                    assert client.recv(10) == b""
                except OSError:
                    pass
                assert not host.netns.listens(port)
    finally:
        cgroup.kill(path)
        cgroup.remove(path)


SERVES = """
import socket
listener = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("serves", flush=True)
conn, _ = listener.accept()
while data := conn.recv(10):
    conn.sendall(data)
"""


@pytest.mark.parametrize("times", [0, 2, 4, 5])
def test_others_change_the_installation_while_an_attach_waits_for_a_held_folder(
    host: Host, start_daemon: StartDaemon, times: int
) -> None:
    """Held from the start, or as soon as the command has listed it so many times."""
    start_daemon()
    with plain(host) as hostile, hostile.listener():
        name = host.endpoint(f"0.0.0.0:{host.port()}")
        with running(hostile.command(*holder(hostile.cgroup, times))):
            rules = ["-i", f"0.0.0.0:80={name}"]
            attach = host.start_command([GRAFT, "attach", "--cgroup", hostile.cgroup, *rules])
            time.sleep(1)
            host.graft("ep", "add", f"o{os.getpid()}-{times}", f"10.98.0.1:{host.port()}", timeout=10 * PATIENCE)
            attach.process.wait(20 * PATIENCE)


# ---- Graft's own folders ----------------------------------------------------------------------------


def test_a_program_cannot_list_cgroups_of_grafts_own(host: Host) -> None:
    name = host.endpoint(f"10.98.0.1:{host.port()}")
    lists = (
        "import os; os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        f"top = '{host.cgroup}'\n"
        f"own = '{cgroup.v2_mount()}' + open('/proc/self/cgroup').read().split('0::')[1].strip()\n"
        "assert own.startswith(top + '/run-'), own\n"
        "open(own + '/cgroup.events').close()\n"  # what it knows the name of it can read
        "for path in (top, top + '/supervisors', top + '/supervisors/keepers', own):\n"
        "    try:\n"
        "        os.listdir(path)\n"
        "        print('lists', path)\n"
        "    except PermissionError:\n"
        "        print('refused')\n"
    )
    result = host.run(["-i", f"0.0.0.0:80={name}"], sys.executable, "-c", lists)
    assert result.stdout.split("\n") == ["refused"] * 4 + [""]


@pytest.fixture
def above() -> Iterator[Path]:
    """A folder that anybody may list."""
    with tempfile.TemporaryDirectory(prefix="gu-", dir="/run") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def test_commands_do_not_make_what_is_there_while_the_folder_above_the_run_folder_is_held(
    host: Host, above: Path
) -> None:
    name = f"graft-test-{os.getpid()}-above"
    environment = {
        **host.environment,
        "GRAFT_RUN_DIR": f"{above}/run",
        "GRAFT_PIN_DIR": f"/sys/fs/bpf/{name}",
        "GRAFT_CGROUP": name,
    }
    there = Host(host.netns, host.client, environment, above)
    try:
        there.graft("up")
        with running(holder(above)):
            there.graft("ep", "add", "a", "10.98.0.1:4711", timeout=10 * PATIENCE)
            there.run(["-i", "0.0.0.0:80=a"], "true", timeout=20 * PATIENCE)
            result = there.graft("down", timeout=20 * PATIENCE, status=None)
            assert "somebody holds the directory" in result.stderr.replace("\n", " ")
    finally:
        there.graft("down", "--force")
