"""UDP of containers that ran before Graft: datagrams relayed both ways, and tables that do not grow."""

from __future__ import annotations

import errno
import os
import signal
import socket
from contextlib import ExitStack, closing

import pytest

from graft.datapath import layout
from graft.splice import datagram_destinations, datagrams
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.plain import Plain
from tests.support.relayed import descriptors, resident_bytes
from tests.support.udp import answers, flood, udp
from tests.support.wait import until

pytestmark = pytest.mark.e2e

INET, INET6 = socket.AF_INET, socket.AF_INET6


def served(container: Plain, address: str = "0.0.0.0", v6only: bool = False) -> tuple[socket.socket, int]:
    """A server in the container at port 53, and the port of the host at which it is published."""
    port = container.host.port()
    server = container.udp(INET6 if ":" in address else INET)
    if ":" in address:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    server.bind((address, 53))
    endpoint, out = container.host.endpoint(f"0.0.0.0:{port}"), container.host.endpoint("0.0.0.0:dynamic")
    asked = address if address in ("0.0.0.0", "::") else f"{address}"
    container.attach("-i", f"{'0.0.0.0' if asked == '::' else asked}:53={endpoint}", "-e", f"{CLIENT4}/32={out}")
    return server, port


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::"])
def test_a_server_sees_its_clients_and_answers_each(container: Plain, address: str) -> None:
    server, port = served(container, address)
    shown = "::ffff:" + CLIENT4 if address == "::" else CLIENT4
    with server, ExitStack() as stack:
        clients = [stack.enter_context(closing(udp(container.host.client, CLIENT4))) for _ in range(3)]
        for number, client in enumerate(clients):
            client.sendto(f"question {number}".encode(), (HOST4, port))
        for _ in clients:
            data, peer = server.recvfrom(100)
            assert peer[:2] == (shown, clients[int(data.split()[1])].getsockname()[1])
            server.sendto(data.replace(b"question", b"answer"), peer)
        for number, client in enumerate(clients):
            assert client.recvfrom(100) == (f"answer {number}".encode(), (HOST4, port))


def test_a_socket_sends_to_several_destinations_and_sees_who_answers(container: Plain) -> None:
    out = container.host.endpoint(f"{HOST4}:dynamic")
    container.attach("-e", f"{CLIENT4}/32={out}")
    sock = container.udp()
    with sock, ExitStack() as stack:
        far = [stack.enter_context(closing(udp(container.host.client, CLIENT4))) for _ in range(3)]
        for turn in range(3):
            for one in far:
                sock.sendto(b"question %d" % turn, one.getsockname())
            for one in far:
                data, peer = one.recvfrom(100)
                assert peer[0] == HOST4 and data == b"question %d" % turn
                one.sendto(str(one.getsockname()[1]).encode(), peer)
            answers = [sock.recvfrom(100) for _ in far]
            assert sorted(answers) == sorted((str(one.getsockname()[1]).encode(), one.getsockname()) for one in far)


@pytest.mark.parametrize("address, source", [(CLIENT4, HOST4), (CLIENT6, HOST6)])
def test_a_connected_socket_is_relayed(container: Plain, address: str, source: str) -> None:
    out = container.host.endpoint(f"[{HOST6}]:dynamic" if ":" in address else "0.0.0.0:dynamic")
    container.attach("-e", f"{address}={out}")
    with closing(udp(container.host.client, address)) as far, container.udp(INET6 if ":" in address else INET) as sock:
        sock.connect((address, far.getsockname()[1]))
        assert sock.getpeername()[:2] == far.getsockname()[:2]
        sock.send(b"question")
        data, peer = far.recvfrom(100)
        assert (data, peer[0]) == (b"question", source)
        far.sendto(b"answer", peer)
        data, peer = sock.recvfrom(100)
        assert (data, peer[:2]) == (b"answer", far.getsockname()[:2])
        sock.sendmsg([b"with a control message"], [(0, 2, (9).to_bytes(4, "little"))] if ":" not in address else [])
        assert far.recv(100) == b"with a control message"


def test_a_relay_whose_socket_root_of_the_namespace_destroys_goes_on_at_its_port(container: Plain) -> None:
    """Nobody else can take the port, and what is sent to it, either."""
    server, port = served(container)
    with server, closing(udp(container.host.client, CLIENT4)) as client:
        for turn in range(2):
            client.sendto(b"question", (HOST4, port))
            _, peer = server.recvfrom(100)
            assert peer == client.getsockname()
            server.sendto(b"answer", peer)
            assert client.recvfrom(100) == (b"answer", (HOST4, port))
            if not turn:
                (relay,) = (value.datagram_port for _, value in container.host.maps.relays.items())
                assert f":{relay} " in container.netns.run("ss", "-KHuan", f"sport = :{relay}")
                assert f":{relay} " in container.netns.run("ss", "-Huan")


def test_a_destination_that_no_rule_grants_is_not_reached(container: Plain) -> None:
    out = container.host.endpoint("0.0.0.0:dynamic")
    container.attach("-e", f"192.0.2.1={out}", "--deny")
    with container.udp() as sock:
        for call in (lambda: sock.sendto(b"x", (CLIENT4, 9)), lambda: sock.connect((CLIENT4, 9))):
            with pytest.raises(OSError) as failed:
                call()
            assert failed.value.errno in (errno.EACCES, errno.EPERM)


def test_nothing_reaches_a_container_without_a_daemon(container: Plain) -> None:
    container.attach("-e", f"{CLIENT4}={container.host.endpoint('0.0.0.0:dynamic')}")
    os.kill(container.daemon(), signal.SIGTERM)

    def is_refused() -> bool:
        with container.udp() as sock:
            try:
                sock.sendto(b"x", (CLIENT4, 9))
            except ConnectionRefusedError:
                return True
        return False

    until("a send is refused", is_refused)


def test_a_flood_from_random_ports_grows_nothing_and_hurts_no_client(container: Plain) -> None:
    """Each of its datagrams has a port of its own, and no answer."""
    server, port = served(container)
    host = container.host
    with server, closing(udp(host.client, CLIENT4)) as client:
        client.sendto(b"first", (HOST4, port))
        _, peer = server.recvfrom(100)
        server.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"
        daemon = container.daemon()
        before, memory = descriptors(daemon), resident_bytes(daemon)
        flood(host.client, CLIENT4, (HOST4, port), server)
        assert len(list(host.maps.exchanges.keys())) <= layout.EXCHANGE_SLOTS
        until("slots are free", lambda: len(list(host.maps.exchanges.keys())) <= datagrams.MAX_CLIENTS + 1)
        assert len(list(host.maps.exchange_clients.keys())) <= datagrams.MAX_CLIENTS + 1
        assert descriptors(daemon) <= before + 1
        assert resident_bytes(daemon) < memory + (8 << 20)
        server.sendto(b"late answer", peer)
        assert client.recv(100) == b"late answer"
        client.sendto(b"second", (HOST4, port))
        assert server.recvfrom(100) == (b"second", peer)


def test_destinations_are_bounded_too(container: Plain) -> None:
    """A socket that sends to thousands of ports has at most so many sockets of the host."""
    container.attach("-e", f"{CLIENT4}={container.host.endpoint('0.0.0.0:dynamic')}")
    with container.udp() as sock, closing(udp(container.host.client, CLIENT4)) as far:
        daemon = container.daemon()
        before = descriptors(daemon)
        for port in range(20000, 22000):
            sock.sendto(b"scan", (CLIENT4, port))
        assert (
            descriptors(daemon) <= before + datagram_destinations.MAX_DESTINATIONS + 64
        )  # closed at the end of a turn
        sock.sendto(b"question", far.getsockname())
        _, peer = far.recvfrom(100)
        far.sendto(b"answer", peer)
        until("the answer", lambda: answers(sock))


def test_the_hosts_socket_is_closed_with_the_programs(container: Plain) -> None:
    container.attach("-e", f"{CLIENT4}={container.host.endpoint('0.0.0.0:dynamic')}")
    with container.udp() as sock, container.udp() as other, closing(udp(container.host.client, CLIENT4)) as far:
        for one in (sock, other):
            one.sendto(b"question", far.getsockname())
            far.recv(100)
        assert container.described()["datagrams"]["destinations"] == 2
        sock.close()
        until("it is closed", lambda: container.described()["datagrams"]["destinations"] == 1)
        other.sendto(b"question", far.getsockname())
        _, peer = far.recvfrom(100)
        far.sendto(b"answer", peer)
        assert other.recv(100) == b"answer"


def test_detaching_ends_it(container: Plain) -> None:
    server, port = served(container)
    with server, closing(udp(container.host.client, CLIENT4)) as client:
        client.sendto(b"first", (HOST4, port))
        server.recvfrom(100)
        container.detach()
        assert not list(container.host.maps.exchanges.keys())
        assert not list(container.host.maps.exchange_clients.keys())
        assert f":{port} " not in container.host.netns.run("ss", "-Hlun")
