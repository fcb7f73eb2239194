"""UDP over IPv6 of containers that ran before Graft: as over IPv4 (test_splice_datagrams.py), by ports at ::1."""

from __future__ import annotations

import errno
import os
import signal
import socket
from contextlib import ExitStack, closing

import pytest

from graft.datapath import layout
from graft.splice import datagram_destinations, stand_in_sockets, stand_ins
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.plain import Plain
from tests.support.relayed import descriptors, resident_bytes
from tests.support.udp import answers, flood, give_address, udp
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

INET6 = socket.AF_INET6
OWN = "fd99::5"
"""An address of the container's."""
OUT = f"[{HOST6}]:dynamic"


def udp6(container: Plain, v6only: bool = False) -> socket.socket:
    """A UDP socket of the container's."""
    sock = container.udp(INET6)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    return sock


def served(
    container: Plain, address: str = "::", v6only: bool = False, dual_stack: bool = False
) -> tuple[socket.socket, int]:
    """A server in the container at port 53, and the port of the host at which it is published."""
    port = container.host.port()
    server = udp6(container, v6only)
    give_address(container.netns, OWN)
    server.bind((address, 53))
    endpoint = container.host.endpoint(f"[::]:{port}", dual_stack=dual_stack)
    rules = ["-e", f"{CLIENT6}/128={container.host.endpoint(OUT)}"]
    if dual_stack:
        rules += ["-e", f"{CLIENT4}/32={container.host.endpoint('0.0.0.0:dynamic')}"]
    container.attach("-i", f"[{address}]:53={endpoint}", *rules)
    return server, port


@pytest.mark.parametrize("v6only", [False, True])
@pytest.mark.parametrize("address", ["::", "::1", OWN])
def test_a_server_sees_its_clients_and_answers_each(container: Plain, address: str, v6only: bool) -> None:
    server, port = served(container, address, v6only)
    with server, ExitStack() as stack:
        clients = [stack.enter_context(closing(udp(container.host.client, CLIENT6))) for _ in range(3)]
        for number, client in enumerate(clients):
            client.sendto(f"question {number}".encode(), (HOST6, port))
        for _ in clients:
            data, peer = server.recvfrom(100)
            assert peer[:2] == (CLIENT6, clients[int(data.split()[1])].getsockname()[1])
            server.sendto(data.replace(b"question", b"answer"), peer)
        for number, client in enumerate(clients):
            data, peer = client.recvfrom(100)
            assert (data, peer[:2]) == (f"answer {number}".encode(), (HOST6, port))


def test_recvmsg_shows_a_client_too(container: Plain) -> None:
    server, port = served(container)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    with server, closing(udp(container.host.client, CLIENT6)) as client:
        client.sendto(b"question", (HOST6, port))
        data, control, _, peer = server.recvmsg(100, 100)
        assert (data, peer[:2]) == (b"question", client.getsockname()[:2])
        server.sendmsg([b"answer"], control, 0, peer)  # from where it was sent to
        assert client.recv(100) == b"answer"


def test_a_dual_stack_server_at_a_dual_stack_endpoint_has_clients_of_both_families(container: Plain) -> None:
    server, port = served(container, dual_stack=True)
    with server:
        for address, host, shown in ((CLIENT4, HOST4, f"::ffff:{CLIENT4}"), (CLIENT6, HOST6, CLIENT6)):
            with closing(udp(container.host.client, address)) as client:
                client.sendto(b"question", (host, port))
                data, peer = server.recvfrom(100)
                assert (data, peer[:2]) == (b"question", (shown, client.getsockname()[1]))
                server.sendto(b"answer", peer)
                data, peer = client.recvfrom(100)
                assert (data, peer[:2]) == (b"answer", (host, port))


def test_a_server_may_connect_to_its_client(container: Plain) -> None:
    """So that its stand-in is no other client's while it is."""
    server, port = served(container)
    with server, closing(udp(container.host.client, CLIENT6)) as client:
        client.sendto(b"question", (HOST6, port))
        _, peer = server.recvfrom(100)
        server.connect(peer)
        assert server.getpeername()[:2] == client.getsockname()[:2]
        server.send(b"answer")
        assert client.recv(100) == b"answer"
        client.sendto(b"more", (HOST6, port))
        assert server.recv(100) == b"more"
        ((_, noted),) = container.host.maps.stand_ins.items()
        assert noted.connected


@pytest.mark.parametrize("v6only, bound", [(False, ""), (True, ""), (False, OWN)])
def test_a_socket_sends_to_several_destinations_and_sees_who_answers(
    container: Plain, v6only: bool, bound: str
) -> None:
    container.attach("-e", f"{CLIENT6}/128={container.host.endpoint(OUT)}")
    with udp6(container, v6only) as sock, ExitStack() as stack:
        if bound:
            give_address(container.netns, OWN)
            sock.bind((bound, 0))
        far = [stack.enter_context(closing(udp(container.host.client, CLIENT6))) for _ in range(3)]
        for turn in range(3):
            for one in far:
                sock.sendto(b"question %d" % turn, one.getsockname())
            for one in far:
                data, peer = one.recvfrom(100)
                assert peer[0] == HOST6 and data == b"question %d" % turn
                one.sendto(str(one.getsockname()[1]).encode(), peer)
            found = [sock.recvfrom(100) for _ in far]
            assert sorted(found) == sorted((str(one.getsockname()[1]).encode(), one.getsockname()) for one in far)


@pytest.mark.parametrize("bound", ["", "::1", OWN, "denied"])
@pytest.mark.parametrize("v6only", [False, True])
def test_a_connected_socket_is_relayed(container: Plain, v6only: bool, bound: str) -> None:
    default = ["--deny"] if bound == "denied" else []
    container.attach("-e", f"{CLIENT6}={container.host.endpoint(OUT)}", *default)
    with closing(udp(container.host.client, CLIENT6)) as far, udp6(container, v6only) as sock:
        if bound and not default:
            give_address(container.netns, OWN)
            sock.bind((bound, 0))
        sock.connect(far.getsockname())
        assert sock.getpeername()[:2] == far.getsockname()[:2]
        for call in (
            sock.send,
            lambda data: sock.sendmsg([data], [(socket.SOL_SOCKET, 36, (9).to_bytes(4, "little"))]),
        ):
            call(b"question")
            data, peer = far.recvfrom(100)
            assert (data, peer[0]) == (b"question", HOST6)
            far.sendto(b"answer", peer)
            data, peer = sock.recvfrom(100)
            assert (data, peer[:2]) == (b"answer", far.getsockname()[:2])


def test_where_there_is_no_ipv6_loopback_a_connected_socket_is_relayed_still(container: Plain) -> None:
    container.netns.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    container.attach("-e", f"{CLIENT6}={container.host.endpoint(OUT)}")
    with closing(udp(container.host.client, CLIENT6)) as far, udp6(container) as sock:
        sock.connect(far.getsockname())
        sock.send(b"question")
        data, peer = far.recvfrom(100)
        assert (data, peer[0]) == (b"question", HOST6)
        far.sendto(b"answer", peer)
        assert sock.recv(100) == b"answer"
        with udp6(container) as other, pytest.raises(OSError):
            other.sendto(b"question", far.getsockname())


def test_a_connected_socket_sends_to_others_too(container: Plain) -> None:
    container.attach("-e", f"{CLIENT6}={container.host.endpoint(OUT)}")
    with (
        closing(udp(container.host.client, CLIENT6)) as far,
        closing(udp(container.host.client, CLIENT6)) as other,
        udp6(container) as sock,
    ):
        sock.connect(far.getsockname())
        sock.sendto(b"to another", other.getsockname())
        assert other.recv(100) == b"to another"
        sock.send(b"to the peer")
        assert far.recv(100) == b"to the peer"


def test_a_destination_that_no_rule_grants_is_not_reached(container: Plain) -> None:
    container.attach("-e", f"2001:db8::1={container.host.endpoint(OUT)}", "--deny")
    with udp6(container) as sock:
        for call in (lambda: sock.sendto(b"x", (CLIENT6, 9)), lambda: sock.connect((CLIENT6, 9))):
            with pytest.raises(OSError) as failed:
                call()
            assert failed.value.errno in (errno.EACCES, errno.EPERM)


@pytest.mark.parametrize("end", ["ended", "killed"])
def test_nothing_reaches_a_container_without_a_daemon(container: Plain, end: str) -> None:
    container.attach("-e", f"{CLIENT6}={container.host.endpoint(OUT)}")
    if end == "killed":
        container.host.kill_daemon()
    else:
        os.kill(container.daemon(), signal.SIGTERM)

    def is_refused(port: int = 9) -> bool:
        with udp6(container) as sock:
            try:
                sock.sendto(b"x", (CLIENT6, port))
            except ConnectionRefusedError:
                return True
        return False

    until("a send is refused", is_refused)
    for port in range(100):
        assert is_refused(1000 + port)
    assert len(list(container.host.maps.stand_ins.keys())) <= 1


def test_a_stand_in_that_root_of_the_namespace_destroys_goes_on_at_its_port(container: Plain) -> None:
    server, port = served(container)
    with server, closing(udp(container.host.client, CLIENT6)) as client:
        for turn in range(2):
            client.sendto(b"question", (HOST6, port))
            _, peer = server.recvfrom(100)
            server.sendto(b"answer", peer)
            assert client.recv(100) == b"answer"
            if not turn:
                (key,) = container.host.maps.stand_ins.keys()
                assert f"[::1]:{key.port} " in container.netns.run("ss", "-KHuan", f"sport = :{key.port}")
                assert f"[::1]:{key.port} " in container.netns.run("ss", "-Huan")


def test_a_flood_from_random_ports_grows_nothing_and_hurts_no_client(container: Plain) -> None:
    """Each of its datagrams has a port of its own, and no answer."""
    server, port = served(container)
    host = container.host
    with server, closing(udp(host.client, CLIENT6)) as client:
        client.sendto(b"first", (HOST6, port))
        _, peer = server.recvfrom(100)
        server.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"
        daemon = container.daemon()
        before, memory = descriptors(daemon), resident_bytes(daemon)
        flood(host.client, CLIENT6, (HOST6, port), server)
        assert len(list(host.maps.stand_ins.keys())) <= stand_in_sockets.MAX_FORGOTTEN + stand_ins.MAX_CLIENTS + 1
        until("ports are free", lambda: len(list(host.maps.stand_ins.keys())) <= stand_ins.MAX_CLIENTS + 1)
        assert len(list(host.maps.stand_in_ports.keys())) <= stand_ins.MAX_CLIENTS + 1
        assert descriptors(daemon) <= before + stand_ins.MAX_CLIENTS + 1
        assert resident_bytes(daemon) < memory + (8 << 20)
        server.sendto(b"late answer", peer)
        assert client.recv(100) == b"late answer"
        client.sendto(b"second", (HOST6, port))
        assert server.recvfrom(100) == (b"second", peer)


def test_destinations_are_bounded_too(container: Plain) -> None:
    """A socket that sends to thousands of ports has at most so many sockets of the host; it may get ENOBUFS."""
    container.attach("-e", f"{CLIENT6}={container.host.endpoint(OUT)}")
    with udp6(container, True) as sock, closing(udp(container.host.client, CLIENT6)) as far:
        daemon = container.daemon()
        before = descriptors(daemon)
        refusals = 0
        for port in range(20000, 22000):
            try:
                sock.sendto(b"scan", (CLIENT6, port))
            except OSError as error:
                assert error.errno == errno.ENOBUFS
                refusals += 1
        assert refusals < 2000
        limit = layout.MAX_OFFERED + datagram_destinations.MAX_DESTINATIONS + 64  # closed at the end of a turn
        assert descriptors(daemon) <= before + limit
        assert len(list(container.host.maps.stand_ins.keys())) <= layout.MAX_OFFERED

        def is_sent() -> bool:
            try:
                sock.sendto(b"question", far.getsockname())
            except OSError:
                return False
            return True

        until("a stand-in is free", is_sent)
        _, peer = far.recvfrom(100)
        far.sendto(b"answer", peer)
        until("the answer", lambda: answers(sock))


def test_the_hosts_socket_is_closed_with_the_programs(container: Plain) -> None:
    container.attach("-e", f"{CLIENT6}={container.host.endpoint(OUT)}")
    with udp6(container) as sock, udp6(container, True) as other, closing(udp(container.host.client, CLIENT6)) as far:
        other.connect(far.getsockname())
        for one in (sock, other):
            one.sendto(b"question", far.getsockname()) if one is sock else one.send(b"question")
            far.recv(100)
        assert container.described()["datagrams"]["destinations"] == 2
        sock.close()
        until("it is closed", lambda: container.described()["datagrams"]["destinations"] == 1)
        until("its stand-in is free", lambda: len(list(container.host.maps.stand_ins.keys())) == 1)
        other.send(b"question")
        _, peer = far.recvfrom(100)
        far.sendto(b"answer", peer)
        assert other.recv(100) == b"answer"


def test_nobody_else_sends_by_a_stand_in(container: Plain) -> None:
    container.attach("-e", f"{CLIENT6}={container.host.endpoint(OUT)}")
    with (
        udp6(container) as sock,
        closing(udp(container.host.client, CLIENT6)) as far,
        closing(udp(container.netns, "::1")) as neighbour,
    ):
        sock.sendto(b"question", far.getsockname())
        _, peer = far.recvfrom(100)
        (key,) = container.host.maps.stand_ins.keys()
        (offer,) = [value for _, value in container.host.maps.offers.items()]
        for port in {key.port, *offer.ports[: offer.count]}:
            neighbour.sendto(b"forged", ("::1", port))
        sock.sendto(b"real", far.getsockname())
        assert far.recvfrom(100) == (b"real", peer)
        far.settimeout(0.3 * PATIENCE)
        with pytest.raises(TimeoutError):
            far.recv(100)


@pytest.mark.parametrize("binds", [False, True])
def test_nobody_else_sends_first_by_the_stand_in_of_a_socket_that_was_connected(container: Plain, binds: bool) -> None:
    container.attach("-e", f"{CLIENT6}={container.host.endpoint(OUT)}")
    with (
        udp6(container, True) as sock,
        closing(udp(container.host.client, CLIENT6)) as far,
        closing(udp(container.netns, "::1")) as neighbour,
    ):
        if binds:
            sock.bind(("::", 0))
        sock.connect(far.getsockname())
        (key,) = container.host.maps.stand_ins.keys()
        neighbour.sendto(b"forged", ("::1", key.port))
        sock.send(b"real")
        data, peer = far.recvfrom(100)
        assert data == b"real"
        far.sendto(b"answer", peer)
        assert sock.recv(100) == b"answer"


def test_detaching_ends_it(container: Plain) -> None:
    server, port = served(container)
    with server, closing(udp(container.host.client, CLIENT6)) as client:
        client.sendto(b"first", (HOST6, port))
        server.recvfrom(100)
        server.sendto(b"out", (CLIENT6, 9))
        assert len(list(container.host.maps.stand_ins.keys())) == 2
        container.detach()
        for table in (container.host.maps.stand_ins, container.host.maps.stand_in_ports, container.host.maps.offers):
            assert not list(table.keys())
        assert f":{port} " not in container.host.netns.run("ss", "-Hlun")
        assert "[::1]:" not in container.netns.run("ss", "-Hauln")
