"""Containers that ran before Graft: what they listen on published, what they connect to carried out."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import resource
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft import splice
from graft.kernel import cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.plain import Plain, plain
from tests.support.program import start
from tests.support.wait import until

pytestmark = pytest.mark.e2e

FEW = 1000  # descriptors
LINGER = struct.pack("ii", 1, 0)


@pytest.fixture
def container(host: Host) -> Iterator[Plain]:
    """A container that runs without Graft."""
    with plain(host) as made:
        yield made


def published(container: Plain, address: str = "0.0.0.0", bound: str = "0.0.0.0:80") -> int:
    """Attach with one ingress rule; gives the port of the endpoint."""
    port = container.host.port()
    endpoint = container.host.endpoint(f"{address}:{port}")
    container.attach("-i", f"{bound}={endpoint}", "-e", f"{CLIENT4}/32={container.host.endpoint('0.0.0.0:dynamic')}")
    return port


def pair(container: Plain, listener: socket.socket, port: int) -> tuple[socket.socket, socket.socket]:
    """A connection through the relay: the client's socket and the one that the container accepted."""
    client = container.host.client.connected(HOST4, port)
    accepted, _ = listener.accept()
    accepted.settimeout(15)
    return client, accepted


def refused(container: Plain, port: int) -> bool:
    """Whether the endpoint refuses."""
    try:
        container.host.client.connected(HOST4, port).close()
    except ConnectionRefusedError:
        return True
    return False


def reset(sock: socket.socket) -> bool:
    """Whether the peer reset the connection; fails where it ended it, or does nothing."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end of the stream."""
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


# ---- in -------------------------------------------------------------------------------------------


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
def test_a_listener_on_one_address_is_dialled_there(container: Plain, address: str) -> None:
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


def test_a_container_that_stopped_to_listen_between_two_looks_resets_at_once(container: Plain) -> None:
    listener = container.listener()
    port = published(container)
    daemon = container.daemon()
    os.kill(daemon, signal.SIGSTOP)  # so that it cannot look
    try:
        listener.close()
        client = container.host.client.connected(HOST4, port)
    finally:
        os.kill(daemon, signal.SIGCONT)
    with client:
        assert reset(client)


def test_a_listener_on_another_containers_socket_is_not_published(container: Plain, host: Host) -> None:
    with container.netns.listener("0.0.0.0", 80):  # in the namespace, but of a process outside the cgroup
        port = published(container)
        assert refused(container, port)


def test_a_dynamic_endpoint_tells_its_port(container: Plain) -> None:
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


# ---- the byte stream ------------------------------------------------------------------------------

sizes = st.one_of(st.integers(0, 5000), st.integers(0, 3_000_000))


def transfer(near: socket.socket, far: socket.socket, there: int, back: int, half_close: bool, seed: int) -> None:
    """Both directions at once, in pieces of random sizes; the ends come in any order. Checked by hash."""
    found: dict[str, str] = {}

    def send(sock: socket.socket, data: bytes, chance: random.Random) -> None:
        at = 0
        while at < len(data):
            size = chance.choice((1, 10, 1000, 100_000, 1_000_000))
            sock.sendall(data[at : at + size])
            at += size
        sock.shutdown(socket.SHUT_WR)

    def receive(sock: socket.socket, name: str) -> None:
        found[name] = hashlib.sha256(read_all(sock)).hexdigest()

    chance = random.Random(seed)
    first, second = chance.randbytes(there), chance.randbytes(back)
    if half_close:  # one direction ends before the other begins
        receiver = threading.Thread(target=receive, args=(far, "first"))
        receiver.start()
        send(near, first, chance)
        receiver.join()
        threads = [threading.Thread(target=send, args=(far, second, chance))]
    else:
        threads = [
            threading.Thread(target=send, args=(near, first, random.Random(seed + 1))),
            threading.Thread(target=send, args=(far, second, random.Random(seed + 2))),
            threading.Thread(target=receive, args=(far, "first")),
        ]
    for thread in threads:
        thread.start()
    receive(near, "second")
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a transfer hangs"
    assert found == {
        "first": hashlib.sha256(first).hexdigest(),
        "second": hashlib.sha256(second).hexdigest(),
    }


def test_what_comes_in_and_the_answer_arrive_byte_by_byte_whatever_the_sizes(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(there=sizes, back=sizes, half_close=st.booleans(), swapped=st.booleans(), seed=st.integers(0, 1 << 30))
        def check(there: int, back: int, half_close: bool, swapped: bool, seed: int) -> None:
            client, accepted = pair(container, listener, port)
            with client, accepted:
                ends = (accepted, client) if swapped else (client, accepted)
                transfer(*ends, there, back, half_close, seed)

        check()


def test_what_goes_out_and_the_answer_arrive_byte_by_byte_whatever_the_sizes(container: Plain) -> None:
    published(container)
    with container.host.client.listener(CLIENT4) as world:
        port = world.getsockname()[1]

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(there=sizes, back=sizes, half_close=st.booleans(), seed=st.integers(0, 1 << 30))
        def check(there: int, back: int, half_close: bool, seed: int) -> None:
            program = container.tcp()
            program.connect((CLIENT4, port))
            accepted, _ = world.accept()
            accepted.settimeout(15)
            with program, accepted:
                transfer(program, accepted, there, back, half_close, seed)

        check()


def test_a_byte_sent_as_urgent_comes_in_its_place(container: Plain) -> None:
    with container.listener() as listener:
        client, accepted = pair(container, listener, published(container))
        with client, accepted:
            client.sendall(b"one ")
            client.send(b"!", socket.MSG_OOB)
            client.sendall(b" two")
            client.shutdown(socket.SHUT_WR)
            assert read_all(accepted) == b"one ! two"


@pytest.mark.parametrize("from_client", [True, False])
def test_a_reset_arrives_as_a_reset(container: Plain, from_client: bool) -> None:
    with container.listener() as listener:
        client, accepted = pair(container, listener, published(container))
        ours, theirs = (client, accepted) if from_client else (accepted, client)
        with theirs:
            ours.sendall(b"x")
            assert theirs.recv(1) == b"x"
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            ours.close()
            assert reset(theirs)


def test_a_reset_after_a_half_close_arrives_too(container: Plain) -> None:
    with container.listener() as listener:
        client, accepted = pair(container, listener, published(container))
        with accepted:
            client.shutdown(socket.SHUT_WR)
            assert accepted.recv(1) == b""
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            client.close()
            until("reset", lambda: accepted.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def test_a_close_in_the_middle_of_a_transfer_resets_the_sender(container: Plain) -> None:
    with container.listener() as listener:
        client, accepted = pair(container, listener, published(container))
        with client:
            accepted.recv(0)
            client.sendall(bytes(100_000))
            accepted.close()  # with data unread: the kernel resets
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                for _ in range(1000):
                    client.sendall(bytes(100_000))


def test_a_slow_reader_stops_its_sender_and_memory_stays_bounded(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        daemon = container.daemon()
        before = resident(daemon)
        pairs = [pair(container, listener, port) for _ in range(8)]
        sent = 0
        for client, _ in pairs:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    if not select.select([], [client], [], 0.2)[1]:
                        break
                    sent += client.send(bytes(1 << 20))
        assert sent < 8 * (32 << 20)  # the buffers of four sockets, and a pipe
        assert resident(daemon) - before < 20 << 20
        for client, accepted in pairs:
            client.close()
            accepted.close()


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


# ---- out ------------------------------------------------------------------------------------------


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
    with container.listener("127.0.0.1", 81) as listener, container.tcp() as program:
        with contextlib.suppress(OSError):
            program.connect((CLIENT4, 9))
            program.recv(1)
        with contextlib.suppress(OSError):
            program.connect(("127.0.0.1", 81))
        if program.connect_ex(("127.0.0.1", 81)) in (0, errno.EISCONN):
            listener.accept()[0].close()
            assert program.getpeername() == ("127.0.0.1", 81)


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


def test_a_connect_that_fails_outside_resets_the_program_at_once(container: Plain) -> None:
    published(container)
    started = time.monotonic()
    with container.tcp() as program, pytest.raises(ConnectionResetError):
        program.connect((CLIENT4, 9))  # nobody listens there
        program.recv(1)
    assert time.monotonic() - started < 5


def test_whoever_connects_to_the_relay_itself_is_reset(container: Plain) -> None:
    published(container)
    port = container.described()["out"]["port"]
    with pytest.raises(ConnectionResetError), container.netns.connected("127.0.0.1", port) as stranger:
        stranger.recv(1)


def test_a_container_whose_daemon_is_dead_is_refused_not_let_through(container: Plain) -> None:
    published(container)
    os.kill(container.daemon(), signal.SIGKILL)
    with container.tcp() as program:
        until("refused", lambda: program.connect_ex((CLIENT4, 9)) == errno.ECONNREFUSED)


# ---- coming and going -----------------------------------------------------------------------------


def test_a_killed_daemon_resets_its_connections_and_the_next_one_takes_up_the_container(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            os.kill(container.daemon(), signal.SIGKILL)
            assert reset(client)
            assert reset(accepted)
        assert until("refused", lambda: refused(container, port))
        with contextlib.ExitStack() as stack:
            program = start([GRAFT, "daemon"], {**os.environ, **container.host.environment})
            stack.callback(program.stop)
            container.until_published(port)
            for one in pair(container, listener, port):
                one.close()


@pytest.mark.parametrize("how", ["term", "detach", "down"])
def test_whatever_ends_it_resets_what_is_connected_and_leaves_nothing(container: Plain, how: str) -> None:
    with container.listener() as listener:
        port = published(container)
        daemon = container.daemon()
        client, accepted = pair(container, listener, port)
        with client, accepted:
            client.sendall(bytes(10_000_000)[: 1 << 16])
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


def test_a_container_that_ends_takes_everything_along(host: Host) -> None:
    with plain(host) as container:
        listener = container.listener()
        port = published(container)
        listener.close()
        cgroup.kill(container.cgroup)
        container.resident.wait()
        cgroup.remove(container.cgroup)
        container.until_published(port, False)
        until("its rules are gone", lambda: not host.maps.containers.keys())
        container.cgroup.mkdir()


def test_a_replaced_policy_refuses_no_client(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        stop = threading.Event()

        def serve() -> None:
            listener.settimeout(0.2)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    accepted, _ = listener.accept()
                    accepted.sendall(b"ok")
                    accepted.close()

        failures: list[Exception] = []

        def ask() -> None:
            while not stop.is_set():
                try:
                    with container.host.client.connected(HOST4, port) as client:
                        assert read_all(client) == b"ok"
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=serve), threading.Thread(target=ask)]
        for thread in threads:
            thread.start()
        endpoint = container.container.endpoints[0]
        for _ in range(5):
            container.attach("-i", f"0.0.0.0:80={endpoint}")
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures


# ---- many -----------------------------------------------------------------------------------------


def test_thousands_of_connections_at_once_are_carried_and_idle_ones_need_no_pipe(container: Plain) -> None:
    count = 5000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held: list[tuple[socket.socket, socket.socket]] = []
    try:
        with container.listener() as listener:
            port = published(container)
            daemon = container.daemon()
            with container.host.client.inside():
                clients = [socket.socket() for _ in range(count)]
            for client in clients:
                client.connect((HOST4, port))
                held.append((client, listener.accept()[0]))
            until("all of them", lambda: container.described()["connections"] == count)
            assert descriptors(daemon) < 2 * count + 500
            names = {client.getsockname(): client for client, _ in held}
            for _, accepted in held:
                accepted.sendall(repr(accepted.getpeername()).encode())
            for name, client in names.items():
                assert client.recv(100) == repr(name).encode()
    finally:
        for one in held:
            for sock in one:
                sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    until("none left", lambda: container.described()["connections"] == 0)


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


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
        before, memory = descriptors(daemon), resident(daemon)
        some(4000)
        until("none left", lambda: container.described()["connections"] == 0)
        until("descriptors given back", lambda: descriptors(daemon) <= before + 80)
        assert not container.host.maps.arrivals.keys()
        assert resident(daemon) - memory < 8 << 20


@pytest.fixture
def frugal(container: Plain) -> Iterator[Plain]:
    """A container whose daemon may have few descriptors."""
    splice.stop(container.host.settings)
    limited = ["prlimit", f"--nofile={FEW}:{FEW}", str(GRAFT), "daemon"]
    program = start(limited, {**os.environ, **container.host.environment})
    program.until("it answers", lambda: (container.host.settings.run_dir / "graftd.sock").exists())
    yield container
    container.detach()
    assert program.stop() == 0


def test_connections_beyond_the_descriptors_wait_and_none_is_lost(frugal: Plain) -> None:
    with frugal.listener() as listener:
        port = published(frugal)
        with frugal.host.client.inside():
            clients = [socket.socket() for _ in range(600)]
        for client in clients:
            client.settimeout(15)
            client.connect((HOST4, port))
        assert descriptors(frugal.daemon()) < FEW
        for client in clients:  # each that ends makes room for one that waits
            listener.accept()[0].close()
            with client:
                assert client.recv(1) == b""


def test_a_daemon_out_of_pipes_still_carries_every_byte(frugal: Plain) -> None:
    # Slow readers hold a pipe each. More of them than pipes, and a transfer beside them.
    container = frugal
    with container.listener() as listener:
        port = published(container)
        held = [pair(container, listener, port) for _ in range(FEW // 16 + 10)]
        for client, _ in held:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(bytes(1 << 20))
        client, accepted = pair(container, listener, port)
        with client, accepted:
            transfer(client, accepted, 2_000_000, 2_000_000, False, 1)
        for one in held:
            for sock in one:
                sock.close()


# ---- refusals -------------------------------------------------------------------------------------


def test_the_kernel_relay_is_refused_in_plain_words(container: Plain) -> None:
    result = container.host.graft("attach", "--cgroup", container.cgroup, "--relay", "kernel", status=7)
    assert "no relay in the kernel" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_second_daemon_is_refused(container: Plain) -> None:
    published(container)
    assert "runs already" in container.host.graft("daemon", status=4).stderr


def test_an_endpoint_that_another_program_has_is_told_and_taken_when_it_is_free(container: Plain) -> None:
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
