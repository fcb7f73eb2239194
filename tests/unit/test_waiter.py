"""What `graft run` becomes: small, and the same in C and in Python."""

from __future__ import annotations

import ast
import os
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.kernel import fork_messages
from graft.swap import waiter
from tests.support.wait import until

FILE = Path(waiter.__file__)
COMPILED = FILE.with_name("graft-wait")
SMALL = {"sys", "posix", "time", "_signal", "_socket", "fcntl", "select", "resource"}
WAYS = [[sys.executable, "-I", "-S", str(FILE)], *([[str(COMPILED)]] if COMPILED.exists() else [])]


def state(**changes: Any) -> dict[str, Any]:
    """Of a program that needs no supervisor, where no fork server listens and none can be started."""
    return {
        "name": b"web",
        "start": b"start",
        "end": b"end",
        "command": [b"/bin/false"],
        "environment": [b"A=b"],
        "program": 0,
        **dict.fromkeys(waiter.DESCRIPTORS, -1),
        **changes,
    }


def test_it_imports_nothing_that_is_written_in_python() -> None:
    top = ast.parse(FILE.read_text()).body
    imported = {name.name for node in top if isinstance(node, ast.Import) for name in node.names}
    assert imported <= SMALL
    assert not [node for node in top if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if Path(sysconfig.get_path("stdlib"), f"{name}.py").exists()]


def test_its_state_is_read_as_it_was_written() -> None:
    wanted = state(name=b"\xff\0 n", command=[b"a", b"", b"b c"], environment=[])
    found = waiter.decoded(waiter.encoded(wanted))
    assert found == {name: wanted[name] for name in (*waiter.TEXTS, *waiter.LISTS)}


class Started:
    """A waiter for a shell script, and what the fork server would be for it."""

    def __init__(self, way: list[str], folder: Path, script: str) -> None:
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(folder / "server"))
        self._listening.listen()
        self._listening.settimeout(30)
        self.pid = os.fork()
        if self.pid == 0:
            _become(way, folder, script)

    def end(self, answer: bytes) -> int:
        """Answer its request for the end; gives its exit status."""
        connection, _ = self._listening.accept()
        with connection, self._listening:
            connection.sendall(waiter.HELLO)
            assert connection.recv(100) == waiter.ASK
            connection.sendall(waiter.HELLO)
            assert connection.recv(100) == b"end"
            connection.sendall(answer)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _become(way: list[str], folder: Path, script: str) -> None:
    try:
        mask = waiter.block_signals()
        program = os.fork()
        if program == 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execv("/bin/sh", ["sh", "-c", script])
        file = os.memfd_create("state", 0)
        os.write(file, waiter.encoded(state()))
        server = os.open(folder / "server", os.O_PATH)
        os.set_inheritable(server, True)
        descriptors = [server if name == "server" else -1 for name in waiter.DESCRIPTORS]
        os.execv(way[0], [*way, *map(str, (file, program, *descriptors))])
    finally:
        os._exit(99)


@pytest.fixture(params=WAYS, ids=lambda way: Path(way[0]).name)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Started]:
    """Starts one for a shell script."""
    return lambda script: Started(request.param, tmp_path, script)


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -TERM $$", -15), ("kill -9 $$", -9)]
)
def test_it_ends_as_the_program_did(start: Callable[[str], Started], script: str, status: int) -> None:
    assert start(script).end(b"\0") == status


def test_a_failure_to_remove_the_container_is_its_status(start: Callable[[str], Started]) -> None:
    assert start("exit 0").end(b"\4") == 4


def test_the_hello_is_the_servers() -> None:
    assert (waiter.HELLO, waiter.ASK) == (fork_messages.HELLO, fork_messages.ASK)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: Path(way[0]).name)
def test_a_server_that_is_stopped_is_not_waited_for(way: list[str], tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(tmp_path / "server"))
    server = os.fork()
    if server == 0:
        listening.listen()
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(server, os.WUNTRACED)
    before = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(way, tmp_path, "exit 0")
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == waiter.FAILED  # nor could another one be started
        assert time.monotonic() - before < 10
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        listening.close()


def test_where_nobody_can_remove_the_container_that_is_a_failure(start: Callable[[str], Started]) -> None:
    assert start("exit 0").end(b"") == waiter.FAILED


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGRTMIN + 3])
def test_it_passes_signals_on(start: Callable[[str], Started], tmp_path: Path, signum: int) -> None:
    script = f"trap 'exit 9' {int(signum)}; touch {tmp_path}/ready; while :; do sleep 0.02; done"
    started = start(script)
    until("the program is ready", (tmp_path / "ready").exists)
    os.kill(started.pid, signum)
    assert started.end(b"\0") == 9
