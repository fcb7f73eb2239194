"""What a seventh reading found about endpoints of type unix: each was possible, and is not any more."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import unix_files
from graft.kernel.unix_files import Target, UnixPathError
from tests.hostile.test_daemon_shares import StartDaemon, served, start_daemon
from tests.hostile.test_sixth_reading_splice import in_one_place, socket_of
from tests.support.holding import NOBODY_WITH_A_PAGE
from tests.support.installation import Host
from tests.support.plain import plain
from tests.support.relayed import published
from tests.support.shell import Word
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e
__all__ = ["start_daemon"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gu-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


# ---- the folder of a socket is somebody else's ------------------------------------------------------


@pytest.mark.parametrize("taken", [False, True])
def test_a_directory_that_is_put_at_the_path_is_not_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Exchanged with the dead socket that Graft saw; ``taken``: and Graft's socket, which cannot be given back then."""
    path, keep = folder / "a.sock", folder / "keep"
    (keep / "sub").mkdir(parents=True)
    (keep / "sub" / "precious").write_text("root's")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    real, calls = unix_files.syscall, []  # type: ignore[attr-defined]

    def syscall(name: str, *args: object) -> int:
        if name != "renameat2":
            return real(name, *args)
        calls.append(name)
        if len(calls) == 1:
            path.rename(folder / "dead")
            keep.rename(path)
        result = real(name, *args)
        if len(calls) == 1 and taken:
            path.unlink()
        return result

    monkeypatch.setattr(unix_files, "syscall", syscall)
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(UnixPathError):
        unix_files.bind(sock, Target(str(path), 0, 0, 0o600), b"/in/own.sock")
    (precious,) = folder.rglob("precious")
    assert precious.read_text() == "root's"
    assert precious.is_relative_to(path) is not taken
    assert len(list(folder.iterdir())) == 2  # and nothing of Graft's is left


@pytest.mark.parametrize("full", [False, True])
def test_a_folder_of_roots_in_the_place_of_grafts_stays_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    private = folder / "roots"
    private.mkdir(0o700)
    if full:
        (private / "precious").write_text("root's")
    real = os.mkdir

    def mkdir(name: str, mode: int, *, dir_fd: int) -> None:
        real(name, mode, dir_fd=dir_fd)
        if str(name).startswith(".graft-"):
            os.rmdir(name, dir_fd=dir_fd)
            os.rename(private, name, dst_dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with socket.socket(socket.AF_UNIX) as sock:
        if full:
            with pytest.raises(PermissionError):
                unix_files.bind(sock, Target(str(folder / "a.sock"), 0, 0, 0o600), b"/own.sock")
            assert len(list(folder.rglob("precious"))) == 1
        else:
            unix_files.bind(sock, Target(str(folder / "a.sock"), 0, 0, 0o600), b"/own.sock")


@pytest.mark.parametrize(("mode", "refused"), [(0o755, False), (0o775, False), (0o1777, False), (0o777, True)])
def test_a_folder_that_anybody_may_change_is_refused(folder: Path, mode: int, refused: bool) -> None:
    folder.chmod(mode)
    if not refused:
        assert unix_files.check(str(folder / "a.sock")) is None
        return
    with pytest.raises(UnixPathError, match="anybody may replace what is in"):
        unix_files.check(str(folder / "a.sock"))


# ---- what a program passes --------------------------------------------------------------------------

BINDS = """
import ctypes, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
addr = struct.pack("H", 1) + b"/own.sock" + bytes(20)
for n in range(100):
    fd = os.open("/dev/null", os.O_RDONLY) if sys.argv[1] == "file" else socket.socket().detach()
    libc.bind(fd, addr, len(addr))
    os.close(fd)
print(ctypes.get_errno(), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("what", ["file", "socket"])
def test_a_bind_of_what_is_no_unix_socket_leaves_no_descriptor(host: Host, folder: Path, what: str) -> None:
    rule = f"unix:/own.sock={host.endpoint(f'unix:{folder}/a.sock')}"
    program = host.start("--user", "nobody", "-i", rule, "--", "python3", "-c", BINDS, what, talk=True)
    descriptors = Path(f"/proc/{host.supervisor(program)}/fd")
    program.until("an answer", lambda: "\n" in program.said)
    assert len(list(descriptors.iterdir())) < 60


# ---- the listener behind an endpoint ----------------------------------------------------------------


@pytest.mark.parametrize("how", ["deleted", "with its policy"])
def test_a_direct_containers_port_on_loopback_stays_shut_when_its_endpoint_is_gone(
    host: Host, folder: Path, tmp_path: Path, how: str
) -> None:
    policy, path = tmp_path / "p.yaml", folder / "a.sock"
    declared = how == "with its policy"
    name = "own" if declared else host.endpoint(f"unix:{path}")
    endpoints = f"endpoints: {{own: 'unix:{path}'}}\n" if declared else ""
    policy.write_text(f"name: t\n{endpoints}ingress: [{{bind: '*:80', endpoint: {name}}}]\ndefault: deny\n")
    words: list[Word] = [
        "--net",
        host.netns.path,
        "--policy",
        policy,
        "--",
        "busybox",
        "httpd",
        "-f",
        "-p",
        "0.0.0.0:80",
    ]
    program = host.start(*words)
    program.until("published", path.is_socket)
    port = int(host.ps()[0]["relay"]["published"][0]["dials"].rpartition(":")[2])
    assert not host.netns.reaches("127.0.0.1", port, 1)
    if how == "deleted":
        host.graft("ep", "del", name, "--force")
    else:
        policy.write_text("name: t\ndefault: deny\n")
        host.graft("policy", "apply", policy)
    time.sleep(0.5)
    assert not host.netns.reaches("127.0.0.1", port, 1)


@pytest.mark.parametrize("attached", [False, True])
def test_an_endpoint_leads_to_nobody_who_takes_a_closed_listeners_port(
    host: Host, folder: Path, attached: bool
) -> None:
    """As in test_sixth_reading_splice.py, which has the control, at a unix socket."""
    path = folder / "a.sock"
    with in_one_place(host, attached) as (container, second), contextlib.ExitStack() as stack:
        listener = container.listener()
        container.attach("-i", f"0.0.0.0:80={host.endpoint(f'unix:{path}')}")
        client = stack.enter_context(socket.socket(socket.AF_UNIX))  # the control: while it listens
        client.connect(str(path))
        client.sendall(b"hello")
        with listener.accept()[0] as accepted:
            accepted.settimeout(15 * PATIENCE)
            assert accepted.recv(10) == b"hello"
            assert accepted.getpeername()[0] == "127.0.0.1"
            client.close()
            assert accepted.recv(10) == b""  # so that it is not the port of the container's that stays taken
        pid = container.daemon()
        if second is not None:
            published(second, bound="0.0.0.0:81")
        os.kill(pid, signal.SIGSTOP)
        try:
            listener.close()
            thief = stack.enter_context(socket_of(container, second))
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(path))
            client.sendall(b"secret")
        finally:
            os.kill(pid, signal.SIGCONT)
        thief.settimeout(15 * PATIENCE)
        accepted = stack.enter_context(thief.accept()[0])
        accepted.settimeout(15 * PATIENCE)
        try:
            got = accepted.recv(10)
        except ConnectionResetError:
            got = b""
        assert got == b""


# ---- a folder whose lock somebody holds -------------------------------------------------------------

HOLDS = (
    NOBODY_WITH_A_PAGE
    + r"""
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
print("holds", flush=True)
libc.syscall(217, fd, ctypes.c_void_p(at), 4096)
"""
)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The user nobody, who may read the folder, reads it into a page that never comes."""
    with subprocess.Popen(["/usr/bin/python3", "-c", HOLDS, folder], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"holds\n"
            time.sleep(0.5)
            yield
        finally:
            holder.kill()


def children_left(host: Host) -> dict[str, int]:
    """The children that wait for a folder in which a file is to be removed, by the record of the file."""
    return {path.name: int(path.read_text()) for path in (host.settings.run_dir / "unix").glob("*.held")}


def test_a_command_that_removes_a_socket_does_not_wait_for_who_holds_its_folder(
    host: Host, folder: Path, start_daemon: StartDaemon
) -> None:
    start_daemon()
    path = folder / "a.sock"
    with plain(host) as container, container.listener():
        container.attach("-i", f"0.0.0.0:80={host.endpoint(f'unix:{path}')}")
        with held(folder):
            host.graft("detach", "--cgroup", container.cgroup, timeout=15 * PATIENCE)
            host.graft("ep", "add", "other", "10.98.0.1:4711", timeout=15 * PATIENCE)
            waiting = children_left(host)
            assert len(waiting) == 1
            for port in range(4712, 4722):
                host.graft("ep", "set", "other", f"10.98.0.1:{port}", timeout=15 * PATIENCE)
            assert children_left(host) == waiting  # one for each folder, whichever command tries
            assert host.run(["-i", "0.0.0.0:80=other"], "true").returncode == 0

        def is_removed() -> bool:
            host.graft("ep", "set", "other", "10.98.0.1:4711")  # the next changes try again
            return not path.exists()

        until("the file is removed", is_removed)
    assert list(folder.iterdir()) == []


def test_graftd_serves_others_while_somebody_holds_the_folder_of_a_socket(
    host: Host, folder: Path, start_daemon: StartDaemon
) -> None:
    start_daemon()
    path = folder / "a.sock"
    with plain(host) as container, plain(host) as other, container.listener(), other.listener() as listener:
        name, port = host.endpoint(f"unix:{path}"), published(other)
        container.attach("-i", f"0.0.0.0:80={name}")
        with held(folder):
            host.graft("detach", "--cgroup", container.cgroup, timeout=15 * PATIENCE)
            assert served(other, listener, port, 8 * PATIENCE)
