"""Established relays outlive graftd: byte for byte, with what was in their pipes, and as long as they are granted."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from graft.policy.model import Policy
from graft.state.compiled_policy import compile_for
from tests.e2e.test_splice_keeper import dead_graftd, kill_graftd, processes
from tests.support.namespaces import CLIENT4
from tests.support.plain import Plain
from tests.support.relayed import descriptors, pair, published, read_all, refused, reset, talk
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

CHUNK = 1 << 16
MEGABYTE = 1 << 20


@pytest.fixture
def relay() -> str:
    return "splice"


class Stream:
    """One direction: so many bytes out of a seed are sent, and what arrives is compared by its hash."""

    def __init__(self, source: socket.socket, target: socket.socket, megabytes: int, seed: int, pause: float) -> None:
        self._source, self._target, self._seed, self._pause = source, target, seed, pause
        self._bytes = megabytes * MEGABYTE
        self.sent, self.got = hashlib.sha256(), hashlib.sha256()
        self.received = 0
        self.error: Exception | None = None
        self._threads = [threading.Thread(target=one) for one in (self._guarded(self._send), self._guarded(self._read))]

    def _guarded(self, call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                call()
            except Exception as error:
                self.error = error

        return run

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def is_running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _send(self) -> None:
        chance = random.Random(self._seed)
        block = chance.randbytes(MEGABYTE)
        left = self._bytes
        while left:
            piece = block[: min(left, chance.choice((1, 1000, CHUNK, MEGABYTE)))]
            self._source.sendall(piece)
            self.sent.update(piece)
            left -= len(piece)
            block = block[1000:] + block[:1000]
        self._source.shutdown(socket.SHUT_WR)

    def _read(self) -> None:
        while data := self._target.recv(CHUNK):
            self.got.update(data)
            self.received += len(data)
            if self._pause:
                time.sleep(self._pause)

    def check(self) -> None:
        for thread in self._threads:
            thread.join(60 * PATIENCE)
            assert not thread.is_alive(), f"hangs after {self.received} bytes"
        assert self.error is None, self.error
        assert self.received == self._bytes
        assert self.sent.digest() == self.got.digest()


def test_two_hundred_megabytes_pass_while_graftd_is_killed_again_and_again(container: Plain) -> None:
    chance = random.Random(12)
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            client.settimeout(60 * PATIENCE)
            accepted.settimeout(60 * PATIENCE)
            there, back = Stream(client, accepted, 200, 1, 0.003), Stream(accepted, client, 100, 2, 0.006)
            there.start()
            back.start()
            kills = 0
            while kills < 8 and there.is_running:
                time.sleep(chance.uniform(0.01, 0.8))
                kill_graftd(container.host)
                kills += 1
            assert kills == 8
            there.check()
            back.check()
        until("none left", lambda: container.described().get("connections") == 0)


def test_what_is_in_a_pipe_is_not_lost(container: Plain) -> None:
    """Its reader has not read anything yet, so all queues are full."""
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            client.setblocking(False)
            sent, last = hashlib.sha256(), time.monotonic()
            count = 0
            while time.monotonic() < last + 1.0:
                data = random.Random(count).randbytes(CHUNK)
                try:
                    done = client.send(data)
                except BlockingIOError:
                    time.sleep(0.01)
                    continue
                sent.update(data[:done])
                count += done
                last = time.monotonic()
            for _ in range(2):
                kill_graftd(container.host)
                processes(container.host)
            client.setblocking(True)
            client.shutdown(socket.SHUT_WR)
            got = read_all(accepted)
            assert len(got) == count
            assert hashlib.sha256(got).digest() == sent.digest()


def test_an_idle_connection_goes_on_both_ways(container: Plain) -> None:
    with container.listener() as listener, container.host.client.listener(CLIENT4) as world:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted, container.tcp() as program:
            program.connect(world.getsockname())
            server, _ = world.accept()
            with server:
                talk(client, accepted)
                talk(program, server)
                for _ in range(3):
                    kill_graftd(container.host)
                    until("served", lambda: container.described().get("connections") == 2)
                    talk(client, accepted)
                    talk(server, program)
                    assert accepted.getpeername() == client.getsockname()
                    assert program.getpeername() == world.getsockname()
                    until("counted", lambda: container.described()["published"][0]["connections"] == 1)


@pytest.mark.parametrize("ended", ["near", "far", "both while dead"])
def test_a_half_closed_connection_goes_on_and_ends(container: Plain, ended: str) -> None:
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            talk(client, accepted)
            first, second = (accepted, client) if ended == "far" else (client, accepted)
            if ended == "both while dead":
                with dead_graftd(container.host):
                    first.sendall(b"last")
                    first.shutdown(socket.SHUT_WR)
            else:
                first.sendall(b"last")
                first.shutdown(socket.SHUT_WR)
                assert read_all(second) == b"last"
                kill_graftd(container.host)
            if ended == "both while dead":
                assert read_all(second) == b"last"
            second.sendall(b"answer")
            second.close()
            assert read_all(first) == b"answer"
        until("none left", lambda: container.described().get("connections") == 0)


def test_a_peer_that_resets_meanwhile_resets_the_other(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            talk(client, accepted)
            with dead_graftd(container.host):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
            assert reset(accepted)
        until("none left", lambda: container.described().get("connections") == 0)


@pytest.mark.parametrize("how", ["endpoint", "policy", "detached"])
def test_a_connection_that_is_granted_no_more_is_reset(container: Plain, how: str) -> None:
    host = container.host
    with container.listener() as listener, host.client.listener(CLIENT4) as world:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted, container.tcp() as program:
            program.connect(world.getsockname())
            server, _ = world.accept()
            with server:
                with dead_graftd(host):
                    if how == "endpoint":
                        with host.installation.transaction() as change:
                            for name in container.container.endpoints:
                                change.endpoints.delete(name, force=True)
                    elif how == "policy":
                        replace_policy(container)
                    else:
                        host.remove(container.container)
                for sock in (client, accepted, program, server):
                    assert reset(sock)


def replace_policy(container: Plain) -> None:
    """As `graft policy apply` does: with a policy that grants nothing."""
    with container.host.installation.transaction() as change:
        change.containers.apply(container.container, compile_for(Policy("none"), {}))


def test_a_connection_ends_at_once_though_the_keeper_has_it_and_does_nothing(container: Plain) -> None:
    host = container.host
    with container.listener() as listener:
        port = published(container)
        pairs = [pair(container, listener, port) for _ in range(3)]
        for two in pairs:
            talk(*two)
        keeper = processes(host)[1]
        os.kill(keeper, signal.SIGSTOP)
        try:
            (ending, other), (resetting, third), (client, accepted) = pairs
            ending.shutdown(socket.SHUT_WR)
            assert read_all(other) == b""
            other.close()
            assert read_all(ending) == b""
            ending.close()
            resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            resetting.close()
            assert reset(third)
            talk(client, accepted)
            for sock in (third, client, accepted, *pair(container, listener, port)):
                sock.close()
        finally:
            os.kill(keeper, signal.SIGCONT)
        until("nothing is left", lambda: container.described().get("connections") == 0)


def test_a_listener_refuses_at_once_though_the_keeper_has_it_and_does_nothing(container: Plain) -> None:
    host = container.host
    with container.listener():
        port = published(container)
        graftd, keeper = processes(host)
        os.kill(keeper, signal.SIGSTOP)
        try:
            container.attach("-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}")
            until("refused", lambda: refused(container, port))
            assert processes(host)[0] == graftd
        finally:
            os.kill(keeper, signal.SIGCONT)


def test_many_connections_leave_nothing_with_the_keeper(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        graftd, keeper = processes(container.host)
        before = descriptors(keeper), descriptors(graftd)
        log = Path(container.host.settings.run_dir) / "graftd.log"
        logged = len(log.read_text())
        for number in range(600):
            client, accepted = pair(container, listener, port)
            with client, accepted:
                if number % 3 == 0:
                    client.sendall(bytes(CHUNK))
                if number % 100 == 50:
                    kill_graftd(container.host)
        until("none left", lambda: container.described().get("connections") == 0)
        graftd = processes(container.host)[0]
        until("descriptors given back", lambda: descriptors(keeper) <= before[0] + 80)
        until("descriptors given back", lambda: descriptors(graftd) <= before[1] + 80)
        assert "hangs" not in log.read_text()[logged:]


def test_thousands_of_connections_are_taken_over_at_once(container: Plain) -> None:
    count = 2000
    with container.listener() as listener:
        port = published(container)
        pairs = []
        for _ in range(count):
            pairs.append(pair(container, listener, port))
        try:
            begun = time.monotonic()
            kill_graftd(container.host)
            until("all are served", lambda: container.described().get("connections") == count)
            assert time.monotonic() - begun < 3 * PATIENCE
            for client, accepted in pairs[::100]:
                talk(client, accepted)
        finally:
            for one in pairs:
                for sock in one:
                    sock.close()
        until("none left", lambda: container.described().get("connections") == 0)


def test_graftd_starts_another_keeper_and_hands_everything_to_it(container: Plain) -> None:
    host = container.host
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            stream = Stream(client, accepted, 100, 1, 0.003)
            stream.start()
            for _ in range(3):
                graftd, keeper = processes(host)
                os.kill(keeper, signal.SIGKILL)
                until("another keeper", lambda before=keeper: processes(host)[1] not in (0, before))  # type: ignore[misc]
                assert processes(host)[0] == graftd
                kill_graftd(host)
                assert processes(host)[0] != graftd
            stream.check()
        for sock in pair(container, listener, port):
            sock.close()
    both = processes(host)
    os.kill(both[1], signal.SIGKILL)
    until("another keeper", lambda: processes(host)[1] not in (0, both[1]))
    both = processes(host)
    container.detach()
    until("both have ended", lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in both))


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_relay_to_a_unix_socket_goes_on(container: Plain, tmp_path: Path, role: str) -> None:
    host, path = container.host, tmp_path / "app.sock"
    name = host.endpoint(f"unix:{path}")
    if role == "client":  # at the host's end
        listener = container.listener()
        container.attach("-i", f"0.0.0.0:80={name}")
        outside, inside = socket.socket(socket.AF_UNIX), None
        outside.connect(str(path))
        inside, _ = listener.accept()
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        container.attach("-e", f"192.0.2.77/32={name}")
        inside = container.tcp()
        inside.connect(("192.0.2.77", 80))
        outside, _ = listener.accept()
    with listener, outside, inside:
        for sock in (outside, inside):
            sock.settimeout(15 * PATIENCE)
        talk(outside, inside)
        for _ in range(2):
            kill_graftd(host)
            talk(outside, inside)
        inside.sendall(b"last")
        inside.close()
        assert read_all(outside) == b"last"


def test_what_waits_for_room_at_a_unix_socket_is_dialled_by_the_next_one(container: Plain, tmp_path: Path) -> None:
    """It was accepted, and has no far end."""
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first, container.tcp() as program:
        server.bind(str(path))
        server.listen(0)
        first.connect(str(path))
        container.attach("-e", f"192.0.2.77/32={container.host.endpoint(f'unix:{path}')}")
        program.connect(("192.0.2.77", 80))
        program.sendall(b"patient")
        until("it waits", lambda: container.described()["connections"] == 1)
        kill_graftd(container.host)
        until("it waits again", lambda: container.described().get("connections") == 1)
        server.accept()[0].close()
        with server.accept()[0] as accepted:
            accepted.settimeout(15 * PATIENCE)
            assert accepted.recv(100) == b"patient"
