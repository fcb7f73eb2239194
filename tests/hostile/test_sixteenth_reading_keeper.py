"""What a sixteenth reading found about graftd's keeper, and what it leaves to the next graftd: bytes of one container's
connection were delivered in another's, because pipes were known by numbers that are used again; and a container that
could not be served again, because its processes had left its network namespace, kept its endpoints.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graft.keeper.process import LOCK
from graft.splice import client as splice
from graft.splice import control, daemon_process
from graft.splice.namespaces import find_process
from tests.hostile.conftest import graft_without
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.plain import Plain, plain
from tests.support.relayed import pair, published
from tests.support.wait import PATIENCE, kill, until

pytestmark = pytest.mark.e2e

StartKeeper = Callable[[str], None]
Pair = tuple[socket.socket, socket.socket]

RESETTING, OTHERS = 24, 8
"""How many connections of one container are reset, and how many another has: what the keeper is told of the first ones
is more than its queue takes (net.unix.max_dgram_qlen).
"""
_BLOCK = 700_000


@pytest.fixture
def start_keeper(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartKeeper]:
    """Starts a keeper whose graftd lacks a defence. Both end with the test."""

    def start(defence: str) -> None:
        splice.stop(host.settings)
        monkeypatch.setattr(daemon_process, "graftd_command", lambda *_: [*map(str, graft_without(defence)), "daemon"])
        daemon_process.ensure_running(host.settings)

    yield start
    splice.stop(host.settings)


@pytest.fixture
def container(host: Host) -> Iterator[Plain]:
    """One that is not attached yet."""
    with plain(host) as made:
        yield made


def graftd(host: Host) -> int:
    """Its process id."""
    found = control.ask(host.settings, {"do": "ping"})
    assert found is not None
    return int(found["pid"])


def keeper(host: Host) -> int:
    """The keeper's process id, also where its graftd takes it for the service manager."""
    return int((host.settings.run_dir / LOCK).read_text())


def kill_graftd(host: Host) -> None:
    """Kill it, and wait until it is dead."""
    kill(graftd(host))


# ---- pipes


def fill(sock: socket.socket, byte: bytes) -> int:
    """Send until nobody takes anything more for a while."""
    sock.setblocking(False)
    total = 0
    for _ in range(3):
        with contextlib.suppress(BlockingIOError):
            while True:
                total += sock.send(byte * (1 << 16))
        time.sleep(0.01)
    return total


def open_pipes(pid: int) -> int:
    """How many pipes a process has one end of, or both."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return sum(name.startswith("pipe:") for name in found)


def full_connections(container: Plain, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Clients of a container whose server reads nothing: each fills a pipe."""
    listener = stack.enter_context(container.listener())
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    port = published(container)
    pairs = [pair(container, listener, port) for _ in range(RESETTING)]
    for client, accepted in pairs:
        stack.enter_context(client)
        stack.enter_context(accepted)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until("all is full", lambda: not sum(fill(client, b"A") for client, _ in pairs))
    return [client for client, _ in pairs]


def received_by_others(container: Plain) -> list[bytes]:
    """What clients of another container get, whose servers send B, when graftd dies before the keeper was told of their
    pipes, nor that the pipes of the first container's are gone.
    """
    host = container.host
    with contextlib.ExitStack() as stack:
        clients = full_connections(container, stack)
        other = stack.enter_context(plain(host))
        listener = stack.enter_context(other.listener())
        port = published(other)
        pairs = [pair(other, listener, port) for _ in range(OTHERS)]
        for client, accepted in pairs:
            stack.enter_context(client)
            stack.enter_context(accepted)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        until("their pipes", lambda: open_pipes(keeper(host)) >= RESETTING)
        os.kill(keeper(host), signal.SIGSTOP)
        try:
            before = open_pipes(graftd(host))
            for client in clients:
                client.close()
            until("theirs are closed", lambda: open_pipes(graftd(host)) <= before - RESETTING)
            for _, accepted in pairs:
                accepted.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    accepted.send(b"B" * _BLOCK)
            until("pipes of others", lambda: open_pipes(graftd(host)) >= before - RESETTING + OTHERS)
            time.sleep(0.5)
            kill_graftd_of(host)
        finally:
            os.kill(keeper(host), signal.SIGCONT)
        until("another one", lambda: control.ask(host.settings, {"do": "ping"}) is not None)
        for _, accepted in pairs:
            accepted.close()
        return [all_of(client) for client, _ in pairs]


def kill_graftd_of(host: Host) -> None:
    """Kill it while the keeper is stopped: it stays as a zombie."""
    pid = graftd(host)
    os.kill(pid, signal.SIGKILL)
    until("it is dead", lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z")


def all_of(sock: socket.socket) -> bytes:
    """What comes until the connection ends."""
    got = bytearray()
    sock.settimeout(5 * PATIENCE)
    with contextlib.suppress(ConnectionResetError, TimeoutError):
        while data := sock.recv(1 << 18):
            got += data
    return bytes(got)


def test_no_byte_of_one_containers_connections_comes_to_another(container: Plain) -> None:
    got = received_by_others(container)
    assert [data.count(b"A") for data in got] == [0] * OTHERS
    assert all(len(data) < _BLOCK for data in got)  # reset: their pipes were not kept


def test_control_where_pipes_are_known_by_their_numbers_bytes_come_to_another(
    start_keeper: StartKeeper, container: Plain
) -> None:
    start_keeper("pipes' inodes")
    assert any(b"A" in data for data in received_by_others(container))


# ---- a network namespace without a process


LEAVES = """
import ctypes, os, socket
listener = socket.socket()
listener.bind(("0.0.0.0", 80))
listener.listen(100)
os.setgid(65534)
os.setuid(65534)
listener.accept()[0].sendall(b"before")
assert ctypes.CDLL(None).unshare(0x10000000 | 0x40000000) == 0  # CLONE_NEWUSER, CLONE_NEWNET
while True:
    listener.accept()[0].sendall(b"after")
"""


def left(container: Plain) -> tuple[int, str]:
    """Have all processes of a container leave its network namespace, and graftd killed. Gives the port and the name of
    its endpoint.
    """
    host = container.host
    port = host.port()
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    container.attach("-i", f"0.0.0.0:80={endpoint}")
    container.start(sys.executable, "-c", LEAVES)
    container.until_published(port)
    with host.client.connected(HOST4, port) as client:
        assert client.recv(100) == b"before"
    container.process.kill()
    container.process.wait()
    until("none is left in it", lambda: not find_process(container.cgroup, container.container.netns))
    killed = graftd(host)
    kill_graftd(host)
    until("another one", lambda: graftd(host) != killed)
    return port, endpoint


def test_a_container_whose_processes_have_left_its_namespace_is_served_on(container: Plain) -> None:
    port, endpoint = left(container)
    with container.host.client.connected(HOST4, port) as client:
        assert client.recv(100) == b"after"
    assert container.described()["serves"]
    container.host.graft("ep", "del", "--force", endpoint)
    container.until_published(port, False)


def test_what_is_left_of_one_that_cannot_be_served_is_closed(start_keeper: StartKeeper, container: Plain) -> None:
    start_keeper("namespace kept")
    port, _ = left(container)
    container.until_published(port, False)
    assert not container.described()["serves"]


def test_control_else_it_keeps_the_endpoint_also_when_that_is_deleted(
    start_keeper: StartKeeper, container: Plain
) -> None:
    start_keeper("unserved")
    port, endpoint = left(container)
    container.host.graft("ep", "del", "--force", endpoint)
    time.sleep(5.0 * PATIENCE)
    assert container.is_published(port)
    assert not container.described()["serves"]
