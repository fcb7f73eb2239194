"""Containers that ran before Graft: their listeners published, their granted connections relayed."""

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.plain import Plain, plain
from tests.support.relayed import pair, published, refused, reset
from tests.support.wait import until

pytestmark = pytest.mark.e2e


def test_the_container_sees_its_clients_own_address(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        client = container.host.client.connected(HOST4, port)
        accepted, address = listener.accept()
        with client, accepted:
            assert address == client.getsockname()
            assert accepted.getpeername() == client.getsockname()
            assert address[0] == CLIENT4


def test_the_container_sees_an_ipv6_clients_own_address(container: Plain) -> None:
    with container.listener("::") as listener:
        port = published(container, "[::]", "[::]:80")
        client = container.host.client.connected(HOST6, port)
        accepted, address = listener.accept()
        with client, accepted:
            assert address[:2] == client.getsockname()[:2]
            assert accepted.getpeername()[0] == CLIENT6


def test_a_dual_stack_listener_sees_an_ipv4_client_as_a_mapped_address(container: Plain) -> None:
    with container.listener("::", v6only=False) as listener:
        port = published(container, "0.0.0.0", "0.0.0.0:80")
        client, accepted = pair(container, listener, port)
        with client, accepted:
            assert accepted.getpeername()[:2] == (f"::ffff:{CLIENT4}", client.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.7", "10.77.0.1"])
def test_a_listener_on_one_address_is_connected_to_at_that_address(container: Plain, address: str) -> None:
    container.netns.run("ip", "address", "add", "10.77.0.1/32", "dev", "lo")
    with container.listener(address) as listener:
        port = published(container, bound=f"{address}:80")
        client, accepted = pair(container, listener, port)
        with client, accepted:
            assert accepted.getpeername() == client.getsockname()
            assert accepted.getsockname()[0] == address


def test_a_rule_for_the_wildcard_does_not_publish_what_listens_on_loopback(container: Plain) -> None:
    with container.listener("127.0.0.1"):
        port = published(container)
        assert refused(container, port)
        assert container.described()["not_granted"] == ["127.0.0.1:80"]


def test_a_connection_that_comes_another_way_keeps_its_own_peer(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with container.netns.connected("127.0.0.1", 80) as neighbour:
            beside, address = listener.accept()
            with beside, client, accepted:
                assert address == beside.getpeername() == neighbour.getsockname()


def test_an_endpoint_refuses_until_the_container_listens_and_again_when_it_stops(container: Plain) -> None:
    port = published(container)
    assert refused(container, port)
    with container.listener() as listener:
        container.until_published(port)
        for one in pair(container, listener, port):
            one.close()
    container.until_published(port, False)
    assert refused(container, port)


def test_a_client_is_reset_where_the_container_stopped_listening_before_the_daemon_saw_it(container: Plain) -> None:
    listener = container.listener()
    port = published(container)
    daemon = container.daemon()
    os.kill(daemon, signal.SIGSTOP)  # so that it does not see the listener closed
    try:
        listener.close()
        client = container.host.client.connected(HOST4, port)
    finally:
        os.kill(daemon, signal.SIGCONT)
    with client:
        assert reset(client)


def test_a_listener_of_a_process_outside_the_cgroup_is_not_published(container: Plain, host: Host) -> None:
    with container.netns.listener("0.0.0.0", 80):  # in the namespace, but of a process outside the cgroup
        port = published(container)
        assert refused(container, port)


def test_the_daemon_says_which_port_a_dynamic_endpoint_got(container: Plain) -> None:
    with container.listener() as listener:
        endpoint = container.host.endpoint("0.0.0.0:dynamic")
        container.attach("-i", f"0.0.0.0:80={endpoint}")
        [one] = container.described()["published"]
        port = int(one["address"].rpartition(":")[2])
        for sock in pair(container, listener, port):
            sock.close()


def test_an_endpoint_that_changes_moves_its_listener_and_keeps_its_connections(container: Plain) -> None:
    with container.listener() as listener:
        first, second = container.host.port(), container.host.port()
        endpoint = container.host.endpoint(f"0.0.0.0:{first}")
        container.attach("-i", f"0.0.0.0:80={endpoint}")
        client, accepted = pair(container, listener, first)
        with client, accepted:
            container.host.graft("ep", "set", endpoint, f"0.0.0.0:{second}")
            container.until_published(second)
            container.until_published(first, False)
            client.sendall(b"still here")
            assert accepted.recv(100) == b"still here"
            for one in pair(container, listener, second):
                one.close()
        container.host.graft("ep", "set", endpoint, f"{HOST4}:{second}")  # the same port, another address
        until("moved", lambda: f"{HOST4}:{second}" in container.host.netns.run("ss", "-Hltn"))
        for one in pair(container, listener, second):
            one.close()
        container.host.graft("ep", "del", "--force", endpoint)
        container.until_published(second, False)


def test_two_containers_that_both_listen_on_80_have_two_endpoints(container: Plain, host: Host) -> None:
    with plain(host) as other, container.listener() as one, other.listener() as two:
        ports = published(container), published(other)
        for own, listener, port in ((container, one, ports[0]), (other, two, ports[1])):
            client, accepted = pair(own, listener, port)
            with client, accepted:
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"
        assert container.daemon() == other.daemon()


def test_a_granted_destination_is_reached_from_the_endpoint(container: Plain) -> None:
    source = container.host.port()
    endpoint = container.host.endpoint(f"{HOST4}:{source}")
    container.attach("-e", f"{CLIENT4}/32={endpoint}")
    with container.host.client.listener(CLIENT4) as world, container.tcp() as program:
        address = world.getsockname()
        program.connect(address)
        accepted, came_from = world.accept()
        with accepted:
            assert came_from == (HOST4, source)
            assert program.getpeername() == address


def test_a_granted_ipv6_destination_is_reached_too(container: Plain) -> None:
    container.attach("-e", f"{CLIENT6}/128={container.host.endpoint('[::]:dynamic')}")
    with container.host.client.listener(CLIENT6) as world, container.tcp(socket.AF_INET6) as program:
        address = world.getsockname()
        program.connect(address)
        accepted, came_from = world.accept()
        with accepted:
            assert came_from[0] == HOST6
            assert program.getpeername()[:2] == address[:2]


def test_an_ipv6_socket_reaches_a_mapped_destination(container: Plain) -> None:
    published(container)
    with container.host.client.listener(CLIENT4) as world, container.tcp(socket.AF_INET6) as program:
        port = world.getsockname()[1]
        program.connect((f"::ffff:{CLIENT4}", port))
        assert program.getpeername()[:2] == (f"::ffff:{CLIENT4}", port)


def test_what_is_not_granted_stays_in_the_container(container: Plain) -> None:
    published(container)
    with container.listener("127.0.0.1", 81) as listener, container.tcp() as program:
        program.connect(("127.0.0.1", 81))
        accepted, address = listener.accept()
        with accepted:
            assert address == program.getsockname()
    with container.tcp() as program, pytest.raises(OSError) as error:
        program.connect((HOST4, 22))
    assert error.value.errno == errno.ENETUNREACH


def test_a_socket_whose_granted_connect_failed_knows_its_next_peer(container: Plain) -> None:
    published(container)
    inside = ("127.0.0.1", 81)
    with container.listener(*inside) as listener, container.tcp() as program:
        with pytest.raises(ConnectionResetError):
            program.connect((CLIENT4, 9))
            program.recv(1)
        results = [program.connect_ex(inside) for _ in range(2)]
        assert results[-1] in (0, errno.EISCONN), results
        listener.accept()[0].close()
        assert program.getpeername() == inside


def test_a_denied_destination_is_refused(container: Plain, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "name: strict\nendpoints: {strict-out: '0.0.0.0:dynamic'}\n"
        f"egress: [{{to: {CLIENT4}/32, ports: [7], endpoint: strict-out}}]\ndefault: deny\n"
    )
    container.attach("--policy", policy)
    with container.tcp() as program:
        assert program.connect_ex((CLIENT4, 8)) == errno.EACCES
    with container.host.client.listener(CLIENT4, 7), container.tcp() as program:
        program.connect((CLIENT4, 7))


def test_a_connect_that_fails_outside_resets_the_program(container: Plain) -> None:
    published(container)
    with container.tcp() as program, pytest.raises(ConnectionResetError):  # and no timeout
        program.connect((CLIENT4, 9))  # a closed port
        program.recv(1)


def test_a_connection_to_the_relays_own_listener_is_reset(container: Plain) -> None:
    published(container)
    port = container.described()["out"]["port"]
    with pytest.raises(ConnectionResetError), container.netns.connected("127.0.0.1", port) as stranger:
        stranger.recv(1)


def test_without_a_daemon_a_container_is_refused(container: Plain) -> None:
    published(container)
    container.host.kill_daemon()
    with container.tcp() as program:
        until("refused", lambda: program.connect_ex((CLIENT4, 9)) == errno.ECONNREFUSED)


def test_a_second_daemon_is_refused(container: Plain) -> None:
    published(container)
    assert "runs already" in container.host.graft("daemon", status=4).stderr


def test_an_endpoint_in_use_is_reported_and_taken_when_it_is_free(container: Plain) -> None:
    with container.listener() as listener:
        with container.host.netns.listener("0.0.0.0", 0) as other:
            port = other.getsockname()[1]
            endpoint = container.host.endpoint(f"0.0.0.0:{port}")
            container.attach("-i", f"0.0.0.0:80={endpoint}")
            [failed] = container.described()["failed"]
            assert "in use" in failed["error"]
        container.until_published(port)
        for one in pair(container, listener, port):
            one.close()
