"""What a tenth reading found in the datagrams of transport splice: others in the container's network namespace (a pod's
other container, any process with any user) took part in what graftd relays for one container.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from graft.splice.datagrams import ExchangeId
from tests.hostile.test_exchanges import NOBODY, THIEF
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import Plain, plain
from tests.support.program import Program, start
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

Without = Callable[[str], Host]
DECEIVER = """
import os, socket, sys
assert os.getuid() == 65534
source, port, to, relay = sys.argv[1:]
stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); stranger.bind((source, int(port)))
stranger.sendto(b"forged", (to, int(relay)))
print("sent", flush=True); print(stranger.recv(100), flush=True)
"""
SUCCESSOR = """
import socket
successor = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print("ready", flush=True)
while True:
    try: successor.bind(("127.0.0.1", 5300)); break
    except OSError: pass
print("has the port", flush=True)
while True:
    data, peer = successor.recvfrom(100)
    print("took", data, flush=True); successor.sendto(b"forged", peer)
"""


@contextmanager
def stranger(container: Plain, code: str, *words: object) -> Iterator[Program]:
    """A process of another cgroup and without privileges, in the container's network namespace."""
    made = start(container.netns.command(*NOBODY, sys.executable, "-c", code, *map(str, words)))
    try:
        yield made
    finally:
        made.stop()


@contextmanager
def far_end(host: Host, port: int = 0) -> Iterator[socket.socket]:
    with host.client.inside():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(sock):
        sock.bind((CLIENT4, port))
        sock.settimeout(10 * PATIENCE)
        yield sock


@contextmanager
def served(host: Host) -> Iterator[tuple[Plain, socket.socket, socket.socket, int]]:
    """A container, its server, a client, and the port of the host at which it reaches the server."""
    with plain(host) as container, far_end(host) as client, container.udp() as server:
        server.bind(("127.0.0.1", 5300))
        port = host.port()
        inside, out = host.endpoint(f"0.0.0.0:{port}"), host.endpoint(f"{HOST4}:dynamic")
        container.attach("-i", f"127.0.0.1:5300={inside}", "-e", f"{CLIENT4}={out}")
        client.connect((HOST4, port))
        yield container, server, client, port


def relay_of(container: Plain) -> int:
    """The port of graftd's relay in the container's namespace."""
    number = container.container.id
    return next(int(value.datagram_port) for key, value in container.host.maps.relays.items() if key.value == number)


def exchange_of(container: Plain, out: bool) -> str:
    """The address in the container's namespace of the one exchange that there is. (Others see it in /proc/net/udp.)"""
    number = container.container.id
    (found,) = [
        ExchangeId(out, value.generation, key.slot)
        for key, value in container.host.maps.exchanges.items()
        if key.container == number and key.out == out
    ]
    return socket.inet_ntoa(found.packed)


def sends_by_anothers_grant(host: Host) -> bool:
    """Whether the far end receives what a stranger sends to the address of a program's exchange."""
    with plain(host) as container, container.udp() as program, far_end(host) as far:
        container.attach("-e", f"{CLIENT4}={host.endpoint(HOST4 + ':dynamic')}")
        program.connect(far.getsockname())
        with stranger(container, DECEIVER, "127.0.0.1", 0, exchange_of(container, True), relay_of(container)) as other:
            other.says("sent")
            program.send(b"the program's")
            data, peer = far.recvfrom(100)
            if data == b"forged":
                return True
            far.sendto(b"answer", peer)
            assert (data, program.recv(100), other.said) == (b"the program's", b"answer", "sent\n")
            return False


def test_a_stranger_does_not_send_by_a_containers_grant(host: Host) -> None:
    assert not sends_by_anothers_grant(host)


def test_control_where_the_relay_hears_anybody_he_does(without: Without) -> None:
    assert sends_by_anothers_grant(without("datagram relay's mark"))


def sends_by_a_neighbours_exchange(host: Host) -> bool:
    """The same of another socket of the container, which may be another user's."""
    with plain(host) as container, container.udp() as program, container.udp() as other, far_end(host) as far:
        container.attach("-e", f"{CLIENT4}={host.endpoint(HOST4 + ':dynamic')}")
        program.connect(far.getsockname())
        other.sendto(b"forged", (exchange_of(container, True), relay_of(container)))
        program.send(b"the program's")
        return far.recv(100) == b"forged"


def test_a_socket_does_not_take_the_exchange_of_another_one(host: Host) -> None:
    assert not sends_by_a_neighbours_exchange(host)


def test_control_where_the_hook_does_not_ask_whose_exchange_it_is_it_does(without: Without) -> None:
    assert sends_by_a_neighbours_exchange(without("exchange's own socket"))


def answers_for_the_server(host: Host) -> bool:
    """Whether a client receives from the endpoint what a stranger sends from the server's port, at another address."""
    with served(host) as (container, server, client, _):
        client.send(b"question")
        data, peer = server.recvfrom(100)
        assert (data, peer) == (b"question", client.getsockname())
        with stranger(
            container, DECEIVER, "127.0.0.2", 5300, exchange_of(container, False), relay_of(container)
        ) as other:
            other.says("sent")
            server.sendto(b"answer", peer)
            return client.recv(100) == b"forged"


def test_a_stranger_does_not_answer_a_containers_clients(host: Host) -> None:
    assert not answers_for_the_server(host)


def test_control_where_the_relay_hears_anybody_he_answers(without: Without) -> None:
    assert answers_for_the_server(without("datagram relay's mark"))


def succeeds_the_server(host: Host) -> bool:
    """Whether a stranger who waits for the port of a server that closes gets datagrams of its clients."""
    with served(host) as (container, server, client, _):
        client.send(b"question")
        assert server.recv(100) == b"question"
        with stranger(container, SUCCESSOR) as other:
            other.says("ready")
            server.close()
            end = time.monotonic() + 2
            while time.monotonic() < end and "took" not in other.said:
                try:
                    client.send(b"secret")
                except ConnectionRefusedError:  # graftd has noticed
                    break
                time.sleep(0.001)
            other.says("has the port")
            time.sleep(0.1)
            return "took b'secret'" in other.said


def test_nobody_gets_the_datagrams_of_a_server_that_closed(host: Host) -> None:
    assert not succeeds_the_server(host)


def test_control_where_the_hook_does_not_ask_who_receives_he_does(without: Without) -> None:
    assert succeeds_the_server(without("datagram relay's receiver"))


def robs_a_connected_socket(host: Host) -> bool:
    """Whether he who takes the port of a killed graftd gets what a socket sends that was connected before."""
    with plain(host) as container, container.udp() as program:
        container.attach("-e", f"{CLIENT4}={host.endpoint('0.0.0.0:dynamic')}")
        program.connect((CLIENT4, 9))
        relay, pid = relay_of(container), container.daemon()
        os.kill(pid, signal.SIGKILL)
        until("graftd is gone", lambda: not Path(f"/proc/{pid}").exists())
        with stranger(container, THIEF, relay) as thief:
            thief.says("ready")
            try:
                program.send(b"secret")
            except PermissionError:
                return False
            thief.says("stole b'secret'")
            return True


def test_nobody_who_takes_the_relays_port_gets_what_connected_sockets_send(host: Host) -> None:
    assert not robs_a_connected_socket(host)


def test_control_where_no_hook_looks_who_receives_he_gets_it(without: Without) -> None:
    assert robs_a_connected_socket(without("relay's mark for datagrams"))


def test_a_socket_of_a_cgroup_below_the_containers_is_its_own(host: Host) -> None:
    """As of a service that systemd starts in a container."""
    with plain(host) as container, far_end(host) as far:
        below = container.cgroup / "below"
        below.mkdir()
        try:
            container.attach("-e", f"{CLIENT4}={host.endpoint(HOST4 + ':dynamic')}")
            code = (
                "import socket, sys\n"
                "open(sys.argv[1] + '/cgroup.procs', 'w').write('0')\n"
                "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
                "s.sendto(b'question', (sys.argv[2], int(sys.argv[3]))); print(s.recv(100), flush=True)\n"
            )
            program = container.start(sys.executable, "-c", code, below, *far.getsockname())
            data, peer = far.recvfrom(100)
            assert data == b"question"
            far.sendto(b"answer", peer)
            program.says("b'answer'")
            program.wait()
        finally:
            below.rmdir()
