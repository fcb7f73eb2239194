"""What a fifteenth reading found: the fork server knew its client by a number, which another process may have by then;
and a command did not look at who serves it.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import surroundings
from graft.model.settings import Settings
from graft.swap import fork_client, fork_servers
from tests.hostile.conftest import graft_without
from tests.hostile.test_eighth_reading_folders import running
from tests.support.installation import GRAFT, Host
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = pytest.mark.e2e

PYTHON = "/usr/bin/python3"
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
CHOOSES_NUMBERS = pytest.mark.skipif(not LAST_PID.exists(), reason="the kernel gives the next process any number")
TRIES = 6


@pytest.fixture
def work(root: None) -> Iterator[Path]:
    """A folder that stays writable where all else is not."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


def confined(writable: str, *words: Word) -> list[Word]:
    """As root without any capability, in namespaces of its own, where the host's files cannot be written to but those
    at ``writable``.
    """
    mounts = f"mount --bind {writable} {writable} && mount -o remount,bind,ro /"
    script = f'{mounts}; for at in /sys/fs/bpf /run; do mount -o remount,bind,ro $at 2>&-; done; exec "$@"'
    own: list[Word] = ["unshare", "--mount", "--net", "--uts", "--ipc", "--", "sh", "-c", script, "sh"]
    return [*own, "setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--", *words]


# ---- a client whose number the server's own child gets ---------------------------------------------------------------

CLIENTS = """
import array, json, os, signal, socket, struct, sys, time
server, path, work, count = int(sys.argv[1]), sys.argv[2], sys.argv[3], 80
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
socks = []
os.kill(server, signal.SIGSTOP)
try:
    for _ in range(count):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        pid = os.fork()
        if pid == 0:
            sock.connect(path)
            os._exit(0)
        os.waitpid(pid, 0)
        socks.append((pid, sock))
    print("connected as", socks[0][0], flush=True)
    sys.stdin.readline()
finally:
    os.kill(server, signal.SIGCONT)
time.sleep(0.3)
for _ in range(6):
    pid = os.fork()  # sooner or later the server's children have their clients' numbers
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(0.02)
for pid, sock in socks:
    sock.settimeout(5)
    try:
        if sock.recv(1) != b"+":
            continue
        sock.send(b"?")
        if sock.recv(1) != b"+":
            continue
        sock.settimeout(0.3)
        sock.recv(100)  # refused
        continue
    except TimeoutError:
        pass
    except OSError:
        continue
    null, cwd = os.open("/dev/null", os.O_RDWR), os.open("/", os.O_PATH)
    environment = {name: text for name, text in os.environ.items() if name.startswith("GRAFT_")} | {"PATH": work}
    words = ["attach", "--cgroup", "podman:x", "-i", "0.0.0.0:80=web"]
    request = {"do": "run", "words": words, "environment": environment, "pid": os.getpid(), "encodings": [None, None]}
    raw = json.dumps(request).encode()
    fds = array.array("i", [null, null, null, cwd, os.pidfd_open(os.getpid())])
    sock.sendmsg([struct.pack("=I", len(raw)) + raw], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    sock.settimeout(5)
    try:
        sock.recv(100)
    except OSError:
        pass
print("done", flush=True)
"""
ENGINE = """#!/bin/sh
/bin/grep CapEff: /proc/self/status >{0}/ran
exit 1
"""


def ran_with(host: Host, server: int, work: Path) -> int:
    """The capabilities of the program that the server has run for him; 0: none."""
    (work / "podman").write_text(ENGINE.format(work))
    (work / "podman").chmod(0o755)
    path = fork_client.folder_of(host.settings) / surroundings.of().name
    program = host.start_command(confined(str(work), PYTHON, "-c", CLIENTS, server, path, work), talk=True)
    program.says("connected as")
    LAST_PID.write_text(str(int(program.said.split()[-1]) - 4))
    program.tell("\n")
    program.says("done", timeout=100)
    program.stop()
    ran = work / "ran"
    return int(ran.read_text().split()[1], 16) if ran.exists() else 0


@contextlib.contextmanager
def server_without(host: Host, monkeypatch: pytest.MonkeyPatch, defence: str) -> Iterator[int]:
    """A fork server that lacks a defence."""

    def undefended(settings: Settings, words: list[str]) -> tuple[list[str], dict[str, str]]:
        return [*map(str, graft_without(defence)), "forks", *words], command(settings, words)[1]

    command = fork_client.command_and_environment
    fork_servers.stop_all(host.settings)
    fork_client.folder_of(host.settings).mkdir(mode=0o700, exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(fork_client, "command_and_environment", undefended)
        assert fork_client._start(host.settings, surroundings.of().name)
    try:
        yield fork_servers.running(host.settings)[0]
    finally:
        fork_servers.stop_all(host.settings)


@CHOOSES_NUMBERS
def test_who_has_ended_is_not_served_when_the_servers_child_has_his_number(host: Host, work: Path) -> None:
    fork_servers.stop_all(host.settings)  # those of other tests, which had other surroundings
    host.run([], "true")
    [server] = until("a server", lambda: fork_servers.running(host.settings))
    for _ in range(2):
        assert not ran_with(host, server, work)
    assert host.run([], "echo", "served").stdout == "served\n"
    assert fork_servers.running(host.settings) == [server]


@CHOOSES_NUMBERS
def test_control_where_he_is_known_by_his_number_he_is(host: Host, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server_without(host, monkeypatch, "client by number") as server:
        assert any(ran_with(host, server, work) for _ in range(TRIES)), "a program of his has run with root's rights"


# ---- somebody who listens in the server's place ----------------------------------------------------------------------

LISTENS = """
import os, socket, sys
path = sys.argv[1]
os.unlink(path)
one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
one.bind(path)
one.listen()
print("ready", flush=True)
while True:
    sock, _ = one.accept()
    sock.send(b"+")
    try:
        if sock.recv(1) == b"?":
            sock.send(b"+")
            data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 10)
            if data:
                print("asked, with", len(fds), "descriptors", flush=True)
            for fd in fds:
                os.close(fd)
    except OSError:
        pass
    sock.close()
"""


def asked(host: Host, words: list[Word]) -> tuple[str, str]:
    """What a command prints that finds a confined root where the server listens; and what that one was asked."""
    host.run([], "true")
    fork_servers.stop_all(host.settings)
    folder = fork_client.folder_of(host.settings)
    path = folder / surroundings.of().name
    path.touch()
    with running(confined(str(folder), PYTHON, "-uc", LISTENS, path)) as program:
        said = run(words, environment=host.environment, status=None, timeout=60).stdout
        fork_servers.stop_all(host.settings)
        program.kill()
        assert program.stdout is not None
        return said, program.stdout.read()


def test_a_command_does_not_ask_a_server_that_is_not_as_itself_is(host: Host) -> None:
    assert asked(host, [GRAFT, "run", "--", "echo", "ran"]) == ("ran\n", "")


def test_control_where_it_asks_whoever_listens_he_gets_its_descriptors(host: Host) -> None:
    _, heard = asked(host, [sys.executable, *graft_without("any server")[1:], "entry", "run", "--", "echo", "ran"])
    assert "with 5 descriptors" in heard
