"""The fork server, its messages, and who is served: without Graft's own jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graft.kernel import fork_messages, fork_server, surroundings
from graft.kernel.fork_server import Server
from graft.kernel.peers import Peer
from graft.model.settings import Settings
from graft.swap import fork_client
from tests.support.wait import until


@contextlib.contextmanager
def serving(path: Path, job: Callable[[socket.socket], None], idle: float = 30) -> Iterator[int]:
    """A server in a process of its own; gives its id."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen()
    server = os.fork()
    if server == 0:
        try:
            Server(listening, lambda connection, _: job(connection)).serve(idle)
        finally:
            os._exit(0)
    listening.close()
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(str(path))
    assert sock.recv(1) == fork_messages.HELLO
    sock.send(fork_messages.ASK)
    assert sock.recv(1) == fork_messages.HELLO
    return sock


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")


def say_descriptors(connection: socket.socket) -> None:
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the folder itself, which was open for the listing
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    fork_messages.send(connection, {"pid": os.getpid(), "parent": os.getppid(), "names": names})
    connection.recv(1)  # until the client has gone


def test_each_client_gets_a_child_that_has_nothing_but_its_connection(tmp_path: Path) -> None:
    with serving(tmp_path / "s", say_descriptors) as server, open(os.devnull), connected(tmp_path / "s") as first:
        one, _ = fork_messages.receive(first)
        with connected(tmp_path / "s") as second:
            two, _ = fork_messages.receive(second)
            assert one["pid"] != two["pid"]
            assert one["parent"] == two["parent"] == server
            for said in (one, two):
                standard = [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
                own = f"/proc/{said['pid']}/"  # what others look up there
                others = [name for name in said["names"] if name not in standard and "pidfd" not in name]
                others = [name for name in others if not name.startswith(own)]
                assert len(others) == 1 and others[0].startswith("socket:"), said


def test_a_child_that_hangs_or_crashes_keeps_nobody(tmp_path: Path) -> None:
    def job(connection: socket.socket) -> None:
        message, _ = fork_messages.receive(connection)
        if message["do"] == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if message["do"] == "hang":
            time.sleep(1000)
        fork_messages.send(connection, {"done": message["do"]})

    with serving(tmp_path / "s", job), connected(tmp_path / "s") as silent, connected(tmp_path / "s") as hanging:
        fork_messages.send(hanging, {"do": "hang"})
        with connected(tmp_path / "s") as crashing:
            fork_messages.send(crashing, {"do": "crash"})
            with pytest.raises(EOFError):
                fork_messages.receive(crashing)
        with connected(tmp_path / "s") as other:
            fork_messages.send(other, {"do": "work"})
            assert fork_messages.receive(other)[0] == {"done": "work"}
        assert silent.fileno() >= 0


def test_its_children_go_on_when_it_is_killed(tmp_path: Path) -> None:
    def job(connection: socket.socket) -> None:
        while message := fork_messages.receive(connection)[0]:
            fork_messages.send(connection, message)

    with serving(tmp_path / "s", job) as server, connected(tmp_path / "s") as client:
        fork_messages.send(client, {"number": 1})
        assert fork_messages.receive(client)[0] == {"number": 1}
        os.kill(server, signal.SIGKILL)
        os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
        fork_messages.send(client, {"number": 2})
        assert fork_messages.receive(client)[0] == {"number": 2}


def test_it_ends_when_nobody_needs_it_and_not_before(tmp_path: Path) -> None:
    with serving(tmp_path / "s", say_descriptors, idle=0.2) as server:
        with connected(tmp_path / "s"):
            time.sleep(0.6)
            assert os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
        until(
            "its end", lambda: os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None, timeout=20
        )


def echo(connection: socket.socket) -> None:
    fork_messages.send(connection, fork_messages.receive(connection)[0])


def test_a_client_of_a_server_that_is_stopped_is_told_so_and_has_asked_for_nothing(tmp_path: Path) -> None:
    settings = Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path)})
    fork_client.folder_of(settings).mkdir()
    path = fork_client.folder_of(settings) / "s"
    with serving(path, echo) as server:
        connected(path).close()  # now it is the process that listens
        os.kill(server, signal.SIGSTOP)
        until("it is stopped", lambda: is_stopped(server))
        before = time.monotonic()
        for _ in range(3):
            assert fork_client.connect_to(settings, "s") is None
        assert time.monotonic() - before < 5
        os.kill(server, signal.SIGCONT)
        connection = fork_client.connect_to(settings, "s")
        assert connection is not None
        with connection:
            fork_messages.send(connection, {"said": True})
            assert fork_messages.receive(connection)[0] == {"said": True}


def test_where_somebody_has_the_lock_to_start_a_server_nobody_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path)})
    fork_client.folder_of(settings).mkdir()
    monkeypatch.setattr(fork_client, "_START_SECONDS", 0.2)
    with fork_client.lock(settings, f"{surroundings.of().name}-start"):
        assert fork_client.connect(settings) is None


def test_a_message_arrives_with_its_descriptors_and_any_bytes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = [os.fsdecode(b"\xff\xfe"), "ä", "\n", ""]
        reader, writer = os.pipe()
        fork_messages.send(ours, {"words": words}, [reader])
        message, (received,) = fork_messages.receive(theirs)
        assert message == {"words": words}
        os.write(writer, b"x")
        assert os.read(received, 1) == b"x"
        assert not os.get_inheritable(received)
        for fd in (reader, writer, received):
            os.close(fd)


def test_a_sender_that_has_gone_takes_back_no_message() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            fork_messages.send(ours, {"said": True})
        assert fork_messages.receive(theirs)[0] == {"said": True}
        with pytest.raises(EOFError):
            fork_messages.receive(theirs)


def test_nothing_is_sent_after_the_last_byte() -> None:
    """The peer may have read all by then, and have gone."""

    class Socket:
        def sendmsg(self, parts: list[bytes], _rights: object) -> int:
            return sum(map(len, parts))

        def sendall(self, _data: object) -> None:
            raise BrokenPipeError

    fork_messages.send(Socket(), {"said": True})  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", [b"\x02\0\0\0[]", b"\x01\0\0\0{", b"\xff\xff\xff\xff{}"])
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(raw)
        with pytest.raises(ValueError):
            fork_messages.receive(theirs)


def test_only_who_is_as_the_server_is_gets_served() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.closing(Peer(theirs, os.getpid())) as client:
        own = surroundings.of()
        assert fork_server.is_served(client, own)
        for field, value in (
            ("root", (1, 2)),
            ("namespaces", (1,)),
            ("rights", (b"0",)),
            ("label", b"confined"),
            ("limits", (b"0",)),
        ):
            other = own._replace(**{field: value})  # type: ignore[arg-type]
            assert not fork_server.is_served(client, other)
            assert other.name != own.name


def test_who_is_under_a_seccomp_filter_is_not_served_and_starts_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    own = surroundings.of()
    with ours, theirs, contextlib.closing(Peer(theirs, os.getpid())) as client:
        filtered = own._replace(rights=(*own.rights[:-1], b"\t2"))
        assert (own.is_filtered, filtered.is_filtered) == (False, True)
        monkeypatch.setattr(surroundings, "of", lambda *_: filtered)
        assert not fork_server.is_served(client, filtered)
    settings = Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path)})
    monkeypatch.setattr(fork_client, "_start", lambda *_: pytest.fail("it was started"))
    assert fork_client.connect(settings) is None


def test_after_a_server_that_did_not_start_nobody_waits_for_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, starts = Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path)}), []
    monkeypatch.setattr(fork_client, "_start", lambda *_: starts.append(1))
    for _ in range(3):
        assert fork_client.connect(settings) is None
    assert len(starts) == 1
    now = time.monotonic()
    for later, count in ((59, 1), (61, 2), (-10, 3)):
        monkeypatch.setattr(time, "monotonic", lambda later=later: now + later)
        assert fork_client.connect(settings) is None
        assert len(starts) == count


@pytest.mark.parametrize("says", [b"", fork_client.LOOKED])
def test_a_server_that_is_kept_from_its_start_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: bytes
) -> None:
    monkeypatch.setattr(fork_client, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(fork_client, "_START_SECONDS", 0.1)
    started = []

    def spawn(_settings: Settings, _words: list[str], fd: int) -> int:
        os.write(fd, says)
        fds = [(os.POSIX_SPAWN_DUP2, fd, 3)]
        started.append(os.posix_spawn("/bin/sleep", ["sleep", "100"], os.environ, file_actions=fds))
        return started[-1]

    monkeypatch.setattr(fork_client, "spawn", spawn)
    settings = Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path)})
    assert fork_client.connect(settings) is None
    with pytest.raises(ChildProcessError):
        os.waitpid(started[0], 0)


def test_hard_limits_are_among_what_is_compared() -> None:
    script = "from graft.kernel import surroundings; print(surroundings.of().name)"
    names = [
        subprocess.run(
            ["prlimit", f"--nofile={limits}", sys.executable, "-P", "-c", script], capture_output=True, check=True
        ).stdout
        for limits in ("100:200", "50:200", "100:150")
    ]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("lines", [(b"CapEff", b"CapBnd"), (b"Seccomp", b"NoNewPrivs"), (b"Uid",)])
def test_rights_are_among_what_is_compared(lines: tuple[bytes, ...]) -> None:
    status = Path("/proc/self/status").read_bytes().splitlines()
    for line in lines:
        assert next(one for one in status if one.startswith(line + b":")).split(b":", 1)[1] in surroundings.of().rights
