"""The relays' daemon: killed, stopped, short of descriptors; and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import Plain, plain
from tests.support.relayed import descriptors, pair, published, read_all, refused, reset, resident_bytes, talk, transfer
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

FEW = 1000  # descriptors


def test_a_killed_daemon_resets_its_connections_and_the_next_one_takes_up_the_container(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            talk(client, accepted)
            container.host.kill_daemon()
            assert reset(client)
            assert reset(accepted)
        assert until("refused", lambda: refused(container, port))
        container.host.start_daemon()
        container.until_published(port)
        for one in pair(container, listener, port):
            one.close()


@pytest.mark.parametrize("how", ["term", "detach", "down"])
def test_when_it_ends_its_connections_are_reset_and_nothing_is_left(container: Plain, how: str) -> None:
    with container.listener() as listener:
        port = published(container)
        daemon = container.daemon()
        client, accepted = pair(container, listener, port)
        with client, accepted:
            talk(client, accepted)
            client.sendall(bytes(1 << 16))
            if how == "term":
                os.kill(daemon, signal.SIGTERM)
            elif how == "detach":
                container.detach()
            else:
                container.host.graft("down", "--force")
            assert reset(client)
            assert reset(accepted)
        until("withdrawn", lambda: not container.is_published(port))
        if how == "detach":
            assert not container.host.maps.relays.keys()
            assert not container.host.maps.arrivals.keys()
            until("the daemon ended", lambda: not Path(f"/proc/{daemon}/exe").exists())


def test_nothing_is_left_of_a_container_that_ends(host: Host) -> None:
    with plain(host) as container:
        listener = container.listener()
        port = published(container)
        listener.close()
        cgroup.kill(container.cgroup)
        container.process.wait()
        cgroup.remove(container.cgroup)
        container.until_published(port, False)
        until("its rules are gone", lambda: not host.maps.containers.keys())
        container.cgroup.mkdir()


def test_a_replaced_policy_refuses_no_client(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        enough, stop = threading.Event(), threading.Event()  # the client stops first: its last request is answered

        def serve() -> None:
            listener.settimeout(0.2)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    accepted, _ = listener.accept()
                    accepted.sendall(b"ok")
                    accepted.close()

        failures: list[Exception] = []
        answers = 0

        def ask() -> None:
            nonlocal answers
            while not enough.is_set():
                try:
                    with container.host.client.connected(HOST4, port) as client:
                        assert read_all(client) == b"ok"
                        answers += 1
                except Exception as error:
                    failures.append(error)

        server, client = threading.Thread(target=serve), threading.Thread(target=ask)
        server.start()
        client.start()
        endpoint = container.container.endpoints[0]
        for _ in range(5):
            container.attach("-i", f"0.0.0.0:80={endpoint}")
            more = answers + 2  # the first of them may have begun before
            until("two requests after it", partial(lambda more: failures or answers >= more, more))
        enough.set()
        client.join()
        stop.set()
        server.join()
        assert not failures


def test_thousands_of_connections_at_once_are_relayed_and_idle_ones_need_no_pipe(container: Plain) -> None:
    count = 5000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connections: list[tuple[socket.socket, socket.socket]] = []
    try:
        with container.listener() as listener:
            port = published(container)
            daemon = container.daemon()
            with container.host.client.inside():
                clients = [socket.socket() for _ in range(count)]
            for client in clients:
                client.connect((HOST4, port))
                connections.append((client, listener.accept()[0]))
            until("all of them", lambda: container.described()["connections"] == count)
            assert descriptors(daemon) < 2 * count + 500
            names = {client.getsockname(): client for client, _ in connections}
            for _, accepted in connections:
                accepted.sendall(repr(accepted.getpeername()).encode())
            for name, client in names.items():
                assert client.recv(100) == repr(name).encode()
    finally:
        for one in connections:
            for sock in one:
                sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    until("none left", lambda: container.described()["connections"] == 0)


def test_many_short_connections_leave_no_descriptor_no_map_entry_and_no_memory(container: Plain) -> None:
    with container.listener() as listener, container.host.client.listener(CLIENT4) as world:
        port = published(container)
        outside = world.getsockname()
        daemon = container.daemon()

        def some(count: int) -> None:
            for number in range(count):
                client, accepted = pair(container, listener, port)
                with client, accepted:
                    (client if number % 2 else accepted).close()
                with container.tcp() as program:
                    program.connect(outside)
                    world.accept()[0].close()

        some(200)
        until("settled", lambda: container.described()["connections"] == 0)
        before, memory = descriptors(daemon), resident_bytes(daemon)
        some(4000)
        until("none left", lambda: container.described()["connections"] == 0)
        until("descriptors given back", lambda: descriptors(daemon) <= before + 80)
        assert not container.host.maps.arrivals.keys()
        assert resident_bytes(daemon) - memory < 8 << 20


@pytest.fixture
def few_descriptors(container: Plain) -> Iterator[None]:
    """Lets the daemon have few descriptors."""
    daemon = container.host.start_daemon(descriptors=FEW)
    yield
    container.detach()
    assert daemon.stop() == 0


def test_connections_beyond_the_descriptors_wait_and_none_is_lost(container: Plain, few_descriptors: None) -> None:
    with container.listener() as listener:
        port = published(container)
        with container.host.client.inside():
            clients = [socket.socket() for _ in range(600)]
        for client in clients:
            client.settimeout(15 * PATIENCE)
            client.connect((HOST4, port))
        assert descriptors(container.daemon()) < FEW
        for client in clients:  # each one that ends makes room for one that waits
            listener.accept()[0].close()
            with client:
                assert client.recv(1) == b""


def test_a_daemon_without_free_pipes_still_relays_every_byte(container: Plain, few_descriptors: None) -> None:
    # Each slow reader has a pipe. There are more of them than pipes, and one transfer beside them.
    with container.listener() as listener:
        port = published(container)
        slow = [pair(container, listener, port) for _ in range(FEW // 16 + 10)]
        for client, _ in slow:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(bytes(1 << 20))
        client, accepted = pair(container, listener, port)
        with client, accepted:
            transfer(client, accepted, 2_000_000, 2_000_000, False, 1)
        for one in slow:
            for sock in one:
                sock.close()
