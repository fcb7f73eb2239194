"""What an eleventh reading found in graftd: datagrams that others wait for, a table that one container fills for all,
what is left open when a container cannot be served, and groups of sockets that share an address. (Others' sockets, with
which each look at a container's takes long: tests/unit/test_splice_listeners.py.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hostile.test_daemon_shares import StartDaemon, served, start_daemon
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import Plain, plain
from tests.support.program import Program, start
from tests.support.relayed import descriptors, published
from tests.support.udp import udp
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

__all__ = ["start_daemon"]

Without = Callable[[str], Host]

# ---- datagrams that are slow to deliver

_BURST = 32
WAITERS = """
import ctypes, fcntl, resource, socket, sys, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
threading.stack_size(65536)
class Pollfd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); server.bind(("0.0.0.0", 53)); server.setblocking(False)
libc, entries, threads = ctypes.CDLL(None), 20000, []
array = (Pollfd * entries)(*[Pollfd(server.fileno(), 0, 0)] * entries)
for _ in range(20):
    threads.append(threading.Thread(target=lambda: libc.poll(array, ctypes.c_ulong(entries), -1), daemon=True))
    threads[-1].start()
def waits(thread):
    return open(f"/proc/self/task/{thread.native_id}/stat").read().rpartition(")")[2].split()[0] == "S"
while not all(map(waits, threads)): time.sleep(0.01)
print("ready", flush=True); sys.stdin.readline()
count = 0
try:
    while server.recv(100): count += 1
except BlockingIOError: print("received", count, flush=True)
sys.stdin.readline()
"""


def delivered_first(host: Host, daemon: Program) -> int:
    """How many of a burst of datagrams, each of which wakes very many waiters, graftd delivers before it serves another
    container.
    """
    with plain(host) as hostile, plain(host) as other, other.listener() as listener:
        waiting = start(hostile.command(sys.executable, "-c", WAITERS), talk=True)
        hostile.started.append(waiting)
        waiting.says("ready", 60)
        port, datagrams = published(other), host.port()
        hostile.attach("-i", f"0.0.0.0:53={host.endpoint(f'0.0.0.0:{datagrams}')}")
        assert served(other, listener, port, 30)
        with host.client.inside():
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with stopped(daemon.process.pid), sender:
            for _ in range(_BURST):
                sender.sendto(b"x", (HOST4, datagrams))
            client = host.client.connected(HOST4, port)
        with client:
            listener.settimeout(60)
            accepted, _ = listener.accept()
            with accepted, stopped(daemon.process.pid):
                waiting.tell("\n")
                waiting.says("received", 60)
        return int(waiting.said.split()[-1])


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        until("it stops", lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_of_many_slow_datagrams_few_are_delivered_before_another_container_is_served(
    host: Host, start_daemon: StartDaemon
) -> None:
    assert delivered_first(host, start_daemon()) <= _BURST // 4


def test_control_all_of_a_turn_are_where_nobody_asks_whether_it_is_over(host: Host, start_daemon: StartDaemon) -> None:
    assert delivered_first(host, start_daemon("datagram turns")) == _BURST


# ---- the table of exchanges

_SLOTS = 512
SENDER = """
import socket, sys
socks = []
for port in range(1, int(sys.argv[2]) + 1):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.sendto(b"q", (sys.argv[1], port)); socks.append(sock)
print("sent", flush=True); sys.stdin.readline()
"""


def slots_of(container: Plain) -> int:
    """How many destinations of a container the table of all containers has."""
    number = container.container.id
    return sum(1 for key in container.host.maps.exchanges.keys() if key.container == number and key.out)  # noqa: SIM118


@contextmanager
def sending(host: Host, count: int) -> Iterator[tuple[Plain, Program]]:
    """A program of a container that has sent from so many sockets, each to a destination of its own."""
    with plain(host) as container:
        container.attach("-e", f"{CLIENT4}={host.endpoint(f'{HOST4}:dynamic')}")
        program = start(container.command(sys.executable, "-c", SENDER, CLIENT4, count), talk=True)
        container.started.append(program)
        program.says("sent", 60)
        yield container, program


def most_slots(host: Host) -> int:
    with sending(host, 3 * _SLOTS) as (container, _):
        return slots_of(container)


def test_a_container_has_so_many_slots_and_no_more(host: Host) -> None:
    assert _SLOTS // 2 < most_slots(host) <= _SLOTS


def test_control_with_as_many_as_there_are_addresses_few_containers_fill_the_table(without: Without) -> None:
    assert most_slots(without("slots of a container")) > 2 * _SLOTS


def keeps_slots_of_closed_sockets(host: Host) -> bool:
    with sending(host, 100) as (container, program):
        assert slots_of(container) > 50
        program.tell("\n")
        program.wait()
        end = time.monotonic() + 5 * PATIENCE
        while time.monotonic() < end:
            if not slots_of(container):
                return False
            time.sleep(0.1)
        return True


def test_the_slots_of_closed_sockets_are_free(host: Host) -> None:
    assert not keeps_slots_of_closed_sockets(host)


def test_control_where_nobody_frees_them_they_stay(host: Host, start_daemon: StartDaemon) -> None:
    start_daemon("freed slots")
    assert keeps_slots_of_closed_sockets(host)


def test_nothing_is_left_of_a_container_that_is_detached(host: Host) -> None:
    with sending(host, 20) as (container, _), container.udp() as server:
        server.bind(("0.0.0.0", 5300))
        port, number = host.port(), container.container.id
        out = host.endpoint(f"{HOST4}:dynamic")
        container.attach("-e", f"{CLIENT4}={out}", "-i", f"0.0.0.0:5300={host.endpoint(f'0.0.0.0:{port}')}")
        with udp(host.client, CLIENT4) as client:
            client.sendto(b"question", (HOST4, port))
            assert server.recv(100) == b"question"
        container.detach()
        maps = host.maps
        left = [*maps.exchanges.keys(), *maps.exchange_clients.keys(), *maps.stand_ins.keys()]
        assert number not in {key.container for key in left}


# ---- a container that cannot be served

_TRIES = 6


def leaked(host: Host, daemon: Program) -> int:
    """How many descriptors graftd has more after it has tried again and again to serve a container in whose namespace
    it cannot listen.
    """
    with plain(host) as hostile:
        hostile.netns.run("ip", "address", "del", "127.0.0.1/8", "dev", "lo")
        words = "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{host.port()}')}"
        counts = []
        for _ in range(_TRIES):
            refused = host.graft("attach", "--cgroup", hostile.cgroup, "--transport", "splice", *words, status=None)
            assert refused.returncode != 0, refused.stdout
            counts.append(descriptors(daemon.process.pid))
        return counts[-1] - counts[0]


def test_graftd_keeps_nothing_open_for_a_container_that_it_cannot_serve(host: Host, start_daemon: StartDaemon) -> None:
    assert leaked(host, start_daemon()) <= 1


def test_control_where_what_was_made_first_is_not_closed_it_does(host: Host, start_daemon: StartDaemon) -> None:
    assert leaked(host, start_daemon("half-made relays")) >= _TRIES - 2


# ---- groups of sockets that share an address (SO_REUSEPORT)

NO_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--securebits=+noroot")
GROUP = """
import ctypes, socket, struct, sys
kind = socket.SOCK_STREAM if sys.argv[1] == "tcp" else socket.SOCK_DGRAM
count, chosen = int(sys.argv[2]), int(sys.argv[3])
group = []
for _ in range(count):
    sock = socket.socket(socket.AF_INET, kind); sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", 5300)); group.append(sock)
    if kind == socket.SOCK_STREAM: sock.listen(50)
code = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, chosen))  # the kernel's classic BPF: return chosen
group[0].setsockopt(socket.SOL_SOCKET, 51, struct.pack("HxxxxxxQ", 1, ctypes.addressof(code)))
print("ready", flush=True)
taker = group[0]
while True:
    if kind == socket.SOCK_DGRAM:
        print("took", taker.recv(100), flush=True)
    else:
        accepted = taker.accept()[0]; print("took", accepted.recv(100), flush=True); accepted.close()
"""
KINDS = pytest.mark.parametrize("kind", ["tcp", "udp"])


@contextmanager
def behind_port_5300(host: Host, kind: str) -> Iterator[tuple[Plain, socket.socket, int]]:
    """A container, its server, which shares its address, and the endpoint's port."""
    with plain(host) as container, container.tcp() if kind == "tcp" else container.udp() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", 5300))
        if kind == "tcp":
            server.listen(50)
        port = host.port()
        spec = f"127.0.0.1:5300={host.endpoint(f'0.0.0.0:{port}')}"
        container.attach("-i", spec)
        yield container, server, port


_CLIENTS = 20


def send_from_each_client(host: Host, kind: str, port: int) -> None:
    for number in range(_CLIENTS):
        if kind == "udp":
            with udp(host.client, CLIENT4) as client:
                client.sendto(b"secret%d" % number, (HOST4, port))
            continue
        with host.client.connected(HOST4, port) as stream, contextlib.suppress(OSError):
            stream.sendall(b"secret%d" % number)
            stream.settimeout(0.2)
            stream.recv(1)


def taken_by_a_stranger(host: Host, kind: str) -> int:
    """How many of the clients a process of another container has, which has joined the server's group, and a program
    that chooses it.
    """
    with behind_port_5300(host, kind) as (container, _, port):
        words = [*NO_CAPABILITIES, sys.executable, "-c", GROUP, kind, "1", "1"]
        stranger = start(container.netns.command(*words))
        try:
            stranger.says("ready")
            send_from_each_client(host, kind, port)
            time.sleep(0.2)
            return stranger.said.count("took b'secret")
        finally:
            stranger.stop()


@KINDS
def test_a_stranger_who_shares_the_servers_address_gets_nothing(host: Host, kind: str) -> None:
    assert taken_by_a_stranger(host, kind) == 0


def test_control_where_one_socket_counts_for_its_group_he_gets_datagrams(without: Without) -> None:
    """Of those clients for which it is the container's that counts."""
    assert taken_by_a_stranger(without("group of receivers"), "udp")


def test_control_where_one_listener_counts_for_its_group_he_gets_connections(
    host: Host, start_daemon: StartDaemon
) -> None:
    start_daemon("group of listeners")
    assert taken_by_a_stranger(host, "tcp") == _CLIENTS


@KINDS
@pytest.mark.parametrize("below", [False, True], ids=["in its cgroup", "below it"])
def test_a_group_of_a_containers_own_sockets_is_served(host: Host, kind: str, below: bool) -> None:
    """With a program that chooses; and where one of them is of a cgroup below the container's."""
    with behind_port_5300(host, kind) as (container, _, port):
        folder = container.cgroup / "below"
        folder.mkdir()
        try:
            enter = f'echo $$ > {folder if below else container.cgroup}/cgroup.procs; exec "$@"'
            words = container.netns.command(sys.executable, "-c", GROUP, kind, "3", "1")
            own = start(["sh", "-c", enter, "sh", *words])
            container.started.append(own)
            own.says("ready")
            send_from_each_client(host, kind, port)
            own.until("all", lambda: own.said.count("took b'secret") == _CLIENTS)
            own.stop()
        finally:
            until("its cgroup is empty", lambda: not (folder / "cgroup.procs").read_text())
            folder.rmdir()


def deferred(host: Host, stranger_too: bool) -> bytes:
    """What a listener gets that accepts a connection when the first byte has come (TCP_DEFER_ACCEPT): until then nobody
    has the other end, and all who listen there are asked about.
    """
    with behind_port_5300(host, "tcp") as (container, server, port), contextlib.ExitStack() as stack:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        if stranger_too:
            words = [*NO_CAPABILITIES, sys.executable, "-c", GROUP, "tcp", "1", "0"]
            other = start(container.netns.command(*words))
            stack.callback(other.stop)
            other.says("ready")
        client = stack.enter_context(host.client.connected(HOST4, port))
        client.sendall(b"first")
        server.settimeout(1)
        try:
            accepted = stack.enter_context(server.accept()[0])
            return accepted.recv(100)
        except (TimeoutError, ConnectionResetError):
            return b""


@pytest.mark.parametrize("stranger_too", [False, True])
def test_a_listener_that_waits_for_the_first_byte_is_served_if_nobody_else_can_have_it(
    host: Host, stranger_too: bool
) -> None:
    assert deferred(host, stranger_too) == (b"" if stranger_too else b"first")


def test_control_where_one_listener_counts_it_is_served_in_any_case(host: Host, start_daemon: StartDaemon) -> None:
    start_daemon("group of listeners")
    assert deferred(host, True) == b"first"
