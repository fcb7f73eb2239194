"""Binds of unix sockets that are under way when what grants them goes."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import unix_files
from graft.kernel.unix_files import Target, UnixPathError
from graft.model.settings import Settings
from graft.model.unix_socket import UnixSocket
from graft.state import bound_sockets
from tests.support.installation import Host
from tests.support.shell import Word
from tests.support.wait import until

pytestmark = pytest.mark.e2e

CONTAINER, ENDPOINT = 7, 5


@pytest.fixture
def folder(root: None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gu-") as made:
        Path(made).chmod(0o711)
        yield Path(made)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path / "run"), "GRAFT_HOST_NETNS": "/proc/self/ns/net"})


def records(settings: Settings) -> list[str]:
    return sorted(path.suffix for path in (settings.run_dir / "unix").glob("*"))


def bind(settings: Settings, path: Path, granted: bool = True) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        unix = UnixSocket(str(path), None, 0o600)
        bound_sockets.bind(settings, CONTAINER, ENDPOINT, sock, unix, b"/own.sock", lambda: granted)


def release(settings: Settings) -> None:
    bound_sockets.release(settings, lambda container, endpoint: (container, endpoint) == (CONTAINER, ENDPOINT))
    bound_sockets.remove_released(settings)


def test_a_socket_is_recorded_until_it_is_removed(settings: Settings, folder: Path) -> None:
    bind(settings, folder / "a.sock")
    assert (folder / "a.sock").is_socket() and records(settings) == [".bound"]
    bind(settings, folder / "a.sock")  # a dead one is replaced, and its record
    assert records(settings) == [".bound"]
    release(settings)
    assert list(folder.iterdir()) == [] and records(settings) == []


def test_a_bind_whose_rule_went_meanwhile_is_undone(settings: Settings, folder: Path) -> None:
    with pytest.raises(UnixPathError, match="its rule is gone") as refused:
        bind(settings, folder / "a.sock", granted=False)
    assert refused.value.errno == errno.EACCES
    assert list(folder.iterdir()) == [] and records(settings) == []


def test_a_bind_that_was_released_meanwhile_is_undone(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule goes between the record and the rename, when its file is not there yet."""
    real = unix_files._move

    def move(*arguments: object) -> None:
        bound_sockets.release(settings, lambda *_: True)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(unix_files, "_move", move)
    with pytest.raises(UnixPathError, match="its rule is gone"):
        bind(settings, folder / "a.sock")
    assert list(folder.iterdir()) == [] and records(settings) == []


def test_a_bind_that_fails_leaves_no_record(settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(*_: object) -> None:
        raise UnixPathError(errno.EADDRINUSE, "taken")

    monkeypatch.setattr(unix_files, "_move", move)
    with pytest.raises(UnixPathError, match="taken"):
        bind(settings, folder / "a.sock")
    assert list(folder.iterdir()) == [] and records(settings) == []


def test_a_file_that_comes_after_its_release_is_removed(settings: Settings, folder: Path) -> None:
    """The process that puts it there goes on when its supervisor was killed, and its container is gone."""
    path, go = folder / "a.sock", folder / "go"
    os.mkfifo(go)
    pid = os.fork()
    if pid == 0:
        sock = socket.socket(socket.AF_UNIX)
        record = settings.run_dir / "unix" / f"{CONTAINER}-{ENDPOINT}-0.bound"
        move = unix_files._move

        def wait_and_move(*arguments: object) -> None:
            go.read_bytes()
            move(*arguments)  # type: ignore[arg-type]

        unix_files._move = wait_and_move  # type: ignore[assignment]
        bound_sockets._bind_and_record(sock, Target(str(path), 0, 0, 0o600), b"/own.sock", None, record)
        os._exit(0)
    until("it is recorded", lambda: records(settings) == [".bound"])
    release(settings)
    assert records(settings) == [".gone"]  # it has not ended
    go.write_bytes(b"go")
    os.waitpid(pid, 0)
    assert path.is_socket()
    bound_sockets.remove_released(settings)
    go.unlink()
    assert list(folder.iterdir()) == [] and records(settings) == []


# ---- end to end -----------------------------------------------------------------------------------------------------

LOOP = """
import errno, socket, sys
while True:
    one = socket.socket(socket.AF_UNIX)
    try:
        one.bind("/own.sock")
    except OSError as error:
        print("refused", error.errno, flush=True)
        break
    one.listen(8)
    print("bound", flush=True)
    try:
        socket.socket(socket.AF_UNIX).bind("/own.sock")  # is the rule still there?
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            print("refused", error.errno, flush=True)
            break
    one.close()
sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["apply", "del"])
def test_no_socket_outlives_the_rule_that_it_was_bound_by(host: Host, folder: Path, how: str) -> None:
    path, policy, none = folder / "a.sock", folder / "p.yaml", folder / "none.yaml"
    none.write_text("name: t\n")
    for number in range(4):
        name = host.endpoint(f"unix:{path}")
        policy.write_text(f"name: t\ningress: [{{bind: 'unix:/own.sock', endpoint: {name}}}]\n")
        program = host.start("--user", "nobody", "--policy", policy, "--", "python3", "-ISc", LOOP, talk=True)
        program.until("bound", lambda program=program: program.said.count("bound") > 2)  # type: ignore[misc]
        time.sleep(0.003 * number)  # somewhere else in its loop
        host.graft(*(("policy", "apply", none) if how == "apply" else ("ep", "del", name, "--force")))
        program.until("refused", lambda program=program: "refused" in program.said)  # type: ignore[misc]
        assert not path.exists()
        program.stop()
        host.graft("ep", "del", name, "--force", status=None)


ACCOMPLICE = """
import socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen(8)
print("ready", flush=True)
while True:
    there, _ = listening.accept()
    _, (fd,), _, _ = socket.recv_fds(there, 16, 1)
    there.send(b"ok")
    there.recv(1)  # the container has ended
    own = socket.socket(fileno=fd)
    if own.getsockname():
        own.listen(8)
    print("listens" if own.getsockname() else "not bound", flush=True)
"""
ENDS_WHILE_IT_BINDS = """
import os, socket, sys, threading, time
helper = socket.socket(socket.AF_UNIX)
helper.connect(sys.argv[1])
own = socket.socket(socket.AF_UNIX)
socket.send_fds(helper, [b"x"], [own.fileno()])
helper.recv(2)
def end():
    time.sleep(float(sys.argv[2]))
    os._exit(0)
threading.Thread(target=end).start()
own.bind("/own.sock")
time.sleep(5)
"""


def test_no_socket_outlives_the_container_that_bound_it(host: Host, folder: Path, tmp_path: Path) -> None:
    path, shared = folder / "a.sock", folder / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    name = host.endpoint(f"unix:{path}")
    accomplice = subprocess.Popen(
        ["/usr/bin/python3", "-uISc", ACCOMPLICE, str(shared / "a")],
        user="nobody",
        group="nogroup",
        extra_groups=[],
        stdout=subprocess.PIPE,
        text=True,
    )
    said: set[str] = set()
    with accomplice:
        try:
            assert accomplice.stdout is not None and accomplice.stdout.readline() == "ready\n"
            for number in range(100):
                program: list[Word] = [
                    "python3",
                    "-ISc",
                    ENDS_WHILE_IT_BINDS,
                    shared / "a",
                    str(0.002 + 0.003 * number),
                ]
                host.graft("run", "--user", "nobody", "-i", f"unix:/own.sock={name}", "--", *program)
                said.add(accomplice.stdout.readline())
                assert not path.exists()
                if number >= 8 and "listens\n" in said:  # so late that one was bound
                    break
            assert "listens\n" in said
        finally:
            accomplice.kill()
