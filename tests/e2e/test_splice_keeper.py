"""graftd comes back: what its keeper has open while it is dead, and what the next graftd makes of that."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graft.kernel import cgroup
from graft.splice import client as splice
from graft.splice import control, daemon_process
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4, Netns
from tests.support.plain import Plain, plain
from tests.support.relayed import pair, published, refused, talk
from tests.support.wait import PATIENCE, kill, until

pytestmark = pytest.mark.e2e


@pytest.fixture
def relay() -> str:
    return "splice"


def processes(host: Host) -> tuple[int, int]:
    """graftd's process id, and its keeper's. Waits for a graftd that is being started."""
    found = control.ask(host.settings, {"do": "ping"})
    assert found is not None
    return found["pid"], found["keeper"]


def kill_graftd(host: Host) -> int:
    """Kill graftd alone, and wait until it is dead; gives the process id that it had."""
    pid, keeper = processes(host)
    assert keeper
    kill(pid)
    return pid


@contextmanager
def dead_graftd(host: Host) -> Iterator[None]:
    """A time in which graftd is dead, and its keeper does not start another one."""
    pid, keeper = processes(host)
    os.kill(keeper, signal.SIGSTOP)
    try:
        os.kill(pid, signal.SIGKILL)
        until("it is dead", lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z")
        yield
    finally:
        os.kill(keeper, signal.SIGCONT)
    assert processes(host)[0] != pid


def inode(netns: Netns, port: int) -> str:
    """That of the listener at a port."""
    return next(word for word in netns.run("ss", "-tlneH", f"sport = :{port}").split() if word.startswith("ino:"))


class Connecting(threading.Thread):
    """A client that connects again and again. ``reads``: and waits for the end of each connection."""

    def __init__(self, host: Host, port: int, reads: bool = False) -> None:
        super().__init__()
        self._host, self._port, self._reads = host, port, reads
        self.ending = threading.Event()
        self.made, self.failures = 0, list[Exception]()

    def run(self) -> None:
        """Count the connections."""
        while not self.ending.is_set():
            try:
                with self._host.client.connected(HOST4, self._port) as client:
                    if self._reads:
                        assert client.recv(1) == b""
                self.made += 1
            except Exception as error:
                self.failures.append(error)


def accept_all(listener: socket.socket, ending: threading.Event) -> threading.Thread:
    """A server that closes what it accepts."""
    listener.settimeout(0.1)

    def serve() -> None:
        while not ending.is_set():
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()

    return threading.Thread(target=serve)


def test_no_client_is_refused_while_graftd_is_killed_and_started_again(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        client = Connecting(container.host, port)
        client.start()
        server = accept_all(listener, client.ending)
        server.start()
        try:
            for _ in range(5):
                before = client.made
                killed = kill_graftd(container.host)
                until("another one", lambda killed=killed: processes(container.host)[0] != killed)  # type: ignore[misc]
                until("clients", lambda before=before: client.made > before + 20)  # type: ignore[misc]
        finally:
            client.ending.set()
            client.join()
            server.join()
        assert client.failures == []


def test_nothing_stays_of_a_container_that_was_removed_while_graftd_was_dead(container: Plain) -> None:
    host = container.host
    with container.listener():
        published(container)
        number = container.container.id
        with dead_graftd(host):
            assert number in {key.value for key in host.maps.relays.keys()}  # noqa: SIM118
            with host.installation.transaction() as change:
                change.containers.remove(container.container)
        until("nothing is left of it", lambda: number not in {key.value for key in host.maps.relays.keys()})  # noqa: SIM118


def test_another_graftd_serves_within_a_second(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        begun = time.monotonic()
        kill_graftd(container.host)
        for sock in pair(container, listener, port):
            sock.close()
        assert time.monotonic() - begun < PATIENCE


def test_a_listener_stays_what_it_is_and_clients_that_come_meanwhile_are_served(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        before = inode(container.host.netns, port)
        with dead_graftd(container.host):
            client = container.host.client.connected(HOST4, port)
            client.sendall(b"meanwhile")
        with client, listener.accept()[0] as accepted:
            assert accepted.recv(100) == b"meanwhile"
            assert accepted.getpeername() == client.getsockname()
        assert inode(container.host.netns, port) == before


def test_a_programs_connection_that_it_begins_meanwhile_is_made(container: Plain) -> None:
    with container.host.client.listener(CLIENT4) as world:
        published(container)
        with container.tcp() as program:
            with dead_graftd(container.host):
                program.connect(world.getsockname())
                program.sendall(b"meanwhile")
            with world.accept()[0] as accepted:
                assert accepted.recv(100) == b"meanwhile"


def test_what_is_not_granted_any_more_is_not_listened_on(container: Plain) -> None:
    host = container.host
    with container.listener():
        port = published(container)
        with dead_graftd(host):
            client = host.client.connected(HOST4, port)
            with host.installation.transaction() as change:  # as `graft policy apply` does, before graftd knows
                change.endpoints.delete(container.container.endpoints[0], force=True)
            assert not refused(container, port)
        until("refused", lambda: refused(container, port))
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)


def test_nothing_is_left_of_a_container_that_was_detached_meanwhile(container: Plain) -> None:
    host = container.host
    with container.listener():
        port = published(container)
        with dead_graftd(host):
            host.remove(container.container)
        until("refused", lambda: refused(container, port))
        assert processes(host)  # it has not ended, which would close everything


def test_a_container_that_ended_meanwhile_is_forgotten(host: Host, relay: str) -> None:
    with plain(host, relay) as container:
        container.listener().close()
        listener = container.listener()
        port = published(container)
        listener.close()
        with dead_graftd(host):
            cgroup.kill(container.cgroup)
            container.process.wait()
            cgroup.remove(container.cgroup)
        container.until_published(port, False)
        container.cgroup.mkdir()


def test_commands_wait_for_the_next_graftd(container: Plain) -> None:
    published(container)
    with dead_graftd(container.host):
        answers: list[object] = []
        asking = threading.Thread(target=lambda: answers.append(processes(container.host)))
        asking.start()
        asking.join(0.3)
        assert not answers
    asking.join(15 * PATIENCE)
    assert answers


@pytest.mark.parametrize("how", ["detach", "down"])
def test_both_end_when_nothing_is_left_to_serve(container: Plain, how: str) -> None:
    published(container)
    both = processes(container.host)
    if how == "detach":
        container.detach()
    else:
        container.host.graft("down", "--force")
    until("both have ended", lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in both))


def test_udp_is_received_that_comes_meanwhile(container: Plain) -> None:
    port = container.host.port()
    with container.udp() as server, container.host.client.inside():
        server.bind(("0.0.0.0", 53))
        container.attach("-i", f"0.0.0.0:53={container.host.endpoint(f'0.0.0.0:{port}')}")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect((HOST4, port))
            with dead_graftd(container.host):
                for number in range(3):
                    client.send(b"%d" % number)  # ECONNREFUSED, where nobody is there
            assert [server.recv(100) for _ in range(3)] == [b"0", b"1", b"2"]


def test_a_talk_goes_on_with_the_next_graftd(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        kill_graftd(container.host)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            talk(client, accepted)


def test_a_graftd_that_hangs_is_killed_and_loses_nothing(container: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    splice.stop(container.host.settings)
    monkeypatch.setattr(daemon_process, "_WATCHDOG_SECONDS", 2.0 * PATIENCE)
    daemon_process.ensure_running(container.host.settings)
    try:
        with container.listener() as listener:
            port = published(container)
            client, accepted = pair(container, listener, port)
            with client, accepted:
                talk(client, accepted)
                before = processes(container.host)[0]
                time.sleep(3.0 * PATIENCE)  # one that works is not killed
                assert processes(container.host)[0] == before
                os.kill(before, signal.SIGSTOP)
                talk(client, accepted)
                assert processes(container.host)[0] != before
    finally:
        splice.stop(container.host.settings)


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
def test_requests_are_answered_while_graftd_is_killed(container: Plain) -> None:
    """Of connections that are made all the time, each in another state when graftd is killed."""
    with container.listener() as listener:
        port = published(container)
        clients = [Connecting(container.host, port, reads=True) for _ in range(3)]
        ending = threading.Event()
        server = accept_all(listener, ending)
        for thread in (server, *clients):
            thread.start()
        try:
            for _ in range(10):
                before = [client.made for client in clients]
                kill_graftd(container.host)
                until(
                    "requests",
                    lambda before=before: all(  # type: ignore[misc]
                        client.made > made + 5 for client, made in zip(clients, before, strict=True)
                    ),
                )
                time.sleep(1.0)
        finally:
            for client in clients:
                client.ending.set()
                client.join()
            ending.set()
            server.join()
        # One that was accepted in the last moment, and not stored yet, can be lost (docs/splice.md): more of them where
        # a busy machine has graftd wait between the two. Where nothing is stored all thirty are.
        assert sum(len(client.failures) for client in clients) <= 5


def test_datagrams_of_a_connected_socket_go_on(container: Plain) -> None:
    host = container.host
    with host.client.inside():
        far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with far, container.udp() as program:
        far.bind((CLIENT4, 0))
        far.settimeout(15 * PATIENCE)
        container.attach("-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}")
        program.connect(far.getsockname())
        program.send(b"before")
        assert far.recv(100) == b"before"
        with dead_graftd(host):
            program.send(b"meanwhile")  # ECONNREFUSED, where nobody is there
        data, sender = far.recvfrom(100)
        assert data == b"meanwhile"
        far.sendto(b"answer", sender)
        assert program.recv(100) == b"answer"
        with container.udp() as other:
            other.sendto(b"another", far.getsockname())
            assert far.recv(100) == b"another"
