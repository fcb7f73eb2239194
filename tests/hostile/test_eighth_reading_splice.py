"""What an eighth reading found in transport splice: descriptors that graftd was sent, arrivals that were pushed out of
their map, default ACLs, and a log without end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import unix_files
from graft.splice.log import ContainerLog
from tests.hostile.test_daemon_shares import Pings, StartDaemon, hostile, other, served, start_daemon
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.plain import Plain, plain
from tests.support.relayed import published, reset
from tests.support.shell import AS_NOBODY
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

__all__ = ["hostile", "other", "start_daemon"]

PYTHON = "/usr/bin/python3"
NOBODY = 65534


@pytest.fixture
def folder(root: None) -> Iterator[Path]:
    """A folder of nobody's with a short path, that any user may enter."""
    with tempfile.TemporaryDirectory(prefix="gu-") as made:
        Path(made).chmod(0o755)
        os.chown(made, NOBODY, NOBODY)
        yield Path(made)


# ---- descriptors that are sent to graftd, and whose last close waits -------------------------------------------------

SENDER = """
import array, os, socket, struct, sys, time
role, path, seconds, flag = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if role == "server":
    listener = socket.socket(socket.AF_UNIX); listener.bind(path); listener.listen()
    print("ready", flush=True)
    peer = listener.accept()[0]
else:
    peer = socket.socket(socket.AF_UNIX); peer.connect(path)
with socket.create_server(("127.0.0.1", 0)) as server:
    lingering = socket.create_connection(server.getsockname())
    reader, _ = server.accept()  # never reads
lingering.setblocking(False)
try:
    while True:
        lingering.send(bytes(1 << 20))
except BlockingIOError:
    pass
lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
print("connected", flush=True)
sys.stdin.readline()
try:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [lingering.fileno()]))]
    peer.sendmsg([b"x"], rights, flag)
except PermissionError:
    print("refused", flush=True)
    sys.exit()
lingering.close()  # the last one is in the message
print("sent", flush=True)
time.sleep(100)
"""
STAND_IN = "10.99.0.5"
ROLES = ("client", "server")
KERNELS = ("", "older kernel")
_numbers = itertools.count(1)


@contextlib.contextmanager
def sending(hostile: Plain, folder: Path, role: str, seconds: int, flag: int = 0) -> Iterator[str]:
    """Somebody at a unix endpoint of a container sends graftd a descriptor. Gives what became of that."""
    name = f"u{next(_numbers)}"
    path = folder / f"{name}.sock"
    hostile.host.graft("ep", "add", name, f"unix:{path}", "--mode", "0666")
    command = [*AS_NOBODY, sys.executable, "-c", SENDER, role, str(path), str(seconds), str(flag)]
    with contextlib.ExitStack() as stack:
        if role == "client":
            stack.enter_context(hostile.listener())
            hostile.attach("-i", f"0.0.0.0:80={name}")
        sender = hostile.host.start_command(command, talk=True)
        stack.callback(sender.stop)
        if role == "server":
            sender.says("ready")
            hostile.attach("-e", f"{STAND_IN}/32={name}")
            program = stack.enter_context(hostile.tcp())
            program.connect((STAND_IN, 80))
        sender.until("it is connected", lambda: "connected" in sender.said)
        daemon = hostile.daemon()
        os.kill(daemon, signal.SIGSTOP)  # until graftd has the last one
        try:
            sender.tell("\n")
            sender.until("it has sent", lambda: "sent" in sender.said or "refused" in sender.said)
        finally:
            os.kill(daemon, signal.SIGCONT)
        yield "refused" if "refused" in sender.said else "sent"


def is_delayed(other: Plain, listener: socket.socket, port: int, within: float) -> bool:
    """Whether graftd serves no other container within that time."""
    return not all(served(other, listener, port, within) for _ in range(3))


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_descriptor_whose_close_waits_does_not_stop_graftd(
    start_daemon: StartDaemon, hostile: Plain, other: Plain, folder: Path, role: str, kernel: str
) -> None:
    start_daemon(kernel)
    with other.listener() as listener:
        port = published(other)
        for flag in (0, socket.MSG_OOB):
            with sending(hostile, folder, role, 60, flag) as became:
                assert became == "sent" or not kernel
                assert not is_delayed(other, listener, port, 10 * PATIENCE)
                if became == "sent":
                    until("it is reset", lambda: not hostile.described()["connections"])


@pytest.mark.parametrize("role", ROLES)
def test_control_where_graftd_drops_it_itself_it_does(
    start_daemon: StartDaemon, hostile: Plain, other: Plain, folder: Path, role: str
) -> None:
    start_daemon("descriptors")
    with other.listener() as listener:
        port = published(other)
        with sending(hostile, folder, role, 10) as became:
            assert became == "sent"
            until("graftd waits", lambda: is_delayed(other, listener, port, 2.0))
            assert until("served again", lambda: served(other, listener, port, 2.0))


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_unix_endpoint_passes_bytes_and_ends(
    start_daemon: StartDaemon, hostile: Plain, folder: Path, kernel: str
) -> None:
    start_daemon(kernel)
    path, data = folder / "plain.sock", os.urandom(3_000_000)
    hostile.host.graft("ep", "add", f"plain{len(kernel)}", f"unix:{path}")
    with hostile.listener() as listener, socket.socket(socket.AF_UNIX) as client:
        hostile.attach("-i", f"0.0.0.0:80=plain{len(kernel)}")
        client.connect(str(path))
        client.settimeout(20 * PATIENCE)
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(20 * PATIENCE)
            for near, far in ((client, accepted), (accepted, client)):
                sender = threading.Thread(target=send_all, args=(near, data))
                sender.start()
                received = b""
                while part := far.recv(1 << 20):
                    received += part
                sender.join()
                assert received == data
    until("closed", lambda: not hostile.described()["connections"])


# ---- arrivals: an entry that others pushed out says nothing ----------------------------------------------------------


def stolen(host: Host, start_daemon: StartDaemon, without: str = "") -> bytes:
    """What a program that took a closed listener's port gets of a client, when the connection waited in its full
    backlog until its entry was pushed out of the map (which is done here by removing it).
    """
    start_daemon(without)
    with plain(host) as victim, contextlib.ExitStack() as stack:
        listener = victim.listener()
        port = published(victim)
        victim.netns.run("ip", "link", "set", "lo", "up")
        listener.close()
        with victim.netns.inside():  # a program of another cgroup in the same namespace
            thief = stack.enter_context(socket.socket())
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("0.0.0.0", 80))
            thief.listen(0)
            stack.enter_context(socket.create_connection(("127.0.0.1", 80)))
        client = stack.enter_context(host.client.connected(HOST4, port))  # before graftd has looked again
        client.settimeout(30 * PATIENCE)
        client.sendall(b"secret")
        keys = host.maps.arrivals.keys
        for key in until("graftd connects", lambda: [one for one in keys() if one.to_port == 80]):
            host.maps.arrivals.delete(key)
        thief.settimeout(30 * PATIENCE)
        thief.accept()[0].close()
        accepted, _ = thief.accept()
        accepted.settimeout(30 * PATIENCE)
        try:
            return accepted.recv(10)
        except ConnectionResetError:
            assert reset(client)
            return b""


def test_a_connection_whose_arrival_was_pushed_out_is_reset(host: Host, start_daemon: StartDaemon) -> None:
    assert stolen(host, start_daemon) == b""


def test_control_where_that_is_proof_another_program_gets_it(host: Host, start_daemon: StartDaemon) -> None:
    assert stolen(host, start_daemon, "taken") == b"secret"


def test_an_arrival_is_removed_when_graftd_has_seen_who_took_it(host: Host) -> None:
    with plain(host) as container, container.listener() as listener:
        assert served(container, listener, published(container), 15 * PATIENCE)
        with host.client.connected(HOST4, int(container.described()["published"][0]["address"].rpartition(":")[2])):
            accepted, _ = listener.accept()
            with accepted:
                until("the entry is removed", lambda: not host.maps.arrivals.keys())


# ---- a folder's default ACL ------------------------------------------------------------------------------------------

GUEST = 12345
ALL = 0xFFFFFFFF


def may_connect(folder: Path) -> bool:
    """Whether a user whom a folder's owner names in its default ACL can connect to a socket of the mode 0660 there."""
    entries = ((1, 7, ALL), (2, 7, GUEST), (4, 5, ALL), (0x10, 7, ALL), (0x20, 5, ALL))  # linux/posix_acl_xattr.h
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(folder, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    path = folder / "a.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        unix_files.bind(sock, unix_files.Target(str(path), 0, 0, 0o660), b"/run/a.sock", 5)
        code = f"import socket; socket.socket(socket.AF_UNIX).connect('{path}')"
        words = [PYTHON, "-c", code]
        return subprocess.run(words, user=GUEST, group=GUEST, extra_groups=[], cwd="/", stderr=-3).returncode == 0


def test_a_folders_default_acl_lets_nobody_in_at_a_socket(folder: Path) -> None:
    assert not may_connect(folder)


def test_control_where_it_is_inherited_it_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix_files, "_remove_acl", lambda file, kind: None)
    assert may_connect(folder)


# ---- the log ---------------------------------------------------------------------------------------------------------


def logged(start_daemon: StartDaemon, hostile: Plain, folder: Path, without: str = "") -> int:
    """How many lines a container's listeners cause that are opened and closed, of an endpoint whose path is taken."""
    daemon = start_daemon(without)
    path = folder / "taken.sock"
    with socket.socket(socket.AF_UNIX) as taken:
        hostile.host.graft("ep", "add", f"taken{len(without)}", f"unix:{path}")
        hostile.attach("-i", f"0.0.0.0:80=taken{len(without)}")
        taken.bind(str(path))
        taken.listen()
        for _ in range(2 * ContainerLog.LINES):
            with hostile.listener():
                until("it fails", lambda: hostile.described()["failed"], pause=0.05)
            until("it is gone", lambda: not hostile.described()["failed"], pause=0.05)
    return daemon.complained.count("taken.sock")


def test_a_container_cannot_make_the_log_grow(start_daemon: StartDaemon, hostile: Plain, folder: Path) -> None:
    assert 0 < logged(start_daemon, hostile, folder) <= ContainerLog.LINES


def test_control_without_a_limit_it_can(start_daemon: StartDaemon, hostile: Plain, folder: Path) -> None:
    assert logged(start_daemon, hostile, folder, "log") > ContainerLog.LINES


# ---- one call that takes long ----------------------------------------------------------------------------------------


def rules(wide: int, deep: int) -> str:
    """A firewall that looks at wide ** deep rules for each connection to port 80."""
    text = "table ip t {\n chain c0 { counter; }\n"
    for number in range(1, deep + 1):
        text += f" chain c{number} {{ " + "; ".join([f"jump c{number - 1}"] * wide) + "; }\n"
    hook = "type filter hook output priority 0; tcp dport 80 tcp flags syn / syn,ack"
    return text + f" chain o {{ {hook} jump c{deep}; }}\n}}\n"


def test_a_container_whose_firewall_takes_long_waits_itself_and_graft_ps_says_so(
    start_daemon: StartDaemon, hostile: Plain, other: Plain
) -> None:
    start_daemon()
    with hostile.listener(), other.listener() as listener:
        port, slow = published(other), published(hostile)
        made = subprocess.run(hostile.netns.command("nft", "-f", "-"), input=rules(4, 13), text=True)
        assert made.returncode == 0
        listener.settimeout(60 * PATIENCE)
        with Pings(other, listener, port), hostile.host.client.connected(HOST4, slow):
            until("it waits", lambda: hostile.described()["waits"])
            assert "a call for it took long" in hostile.host.graft("ps").stdout
