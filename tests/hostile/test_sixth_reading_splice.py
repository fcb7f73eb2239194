"""What a sixth reading found in transport splice: deliveries that take seconds, and ports that somebody else takes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.hostile.conftest import Without
from tests.hostile.test_daemon_shares import Pings, StartDaemon, hostile, other, start_daemon
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import Plain, plain
from tests.support.relayed import published, reset
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

__all__ = ["hostile", "other", "start_daemon"]

# ---- what is delivered at once wakes whoever waits, and that may be millions -----------------------------------------

WAITERS = """
import ctypes, resource, socket, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
threading.stack_size(65536)
entries, libc = 20000, ctypes.CDLL(None)
class Pollfd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))
listener = socket.create_server(("0.0.0.0", 80), backlog=100)
array = (Pollfd * entries)(*[Pollfd(listener.fileno(), 0, 0)] * entries)
for _ in range(int(sys.argv[1])):
    threading.Thread(target=lambda: libc.poll(array, ctypes.c_ulong(entries), -1), daemon=True).start()
print("ready", flush=True)
while True:
    listener.accept()[0].close()
"""
THREADS = 200
SECONDS = 6


class Knocking:
    """While the block runs, clients connect to an endpoint, ten at a time, again and again."""

    def __init__(self, container: Plain, port: int) -> None:
        self._container, self._port = container, port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._knock)

    def _knock(self) -> None:
        while not self._stop.is_set():
            with contextlib.ExitStack() as stack:
                for _ in range(10):
                    with self._container.host.client.inside():
                        client = stack.enter_context(socket.socket())
                    client.setblocking(False)
                    client.connect_ex((HOST4, self._port))
                self._stop.wait(0.5)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def served_beside_waiters(start_daemon: StartDaemon, hostile: Plain, other: Plain, without: str = "") -> int:
    """How often a container is served in some seconds, while each connect to another one wakes millions of waiters."""
    start_daemon(without)
    hostile.start(sys.executable, "-c", WAITERS, THREADS).says("ready", 60)
    port = published(hostile)
    with other.listener() as listener:
        listener.settimeout(60 * PATIENCE)
        with Pings(other, listener, published(other)) as pings, Knocking(hostile, port):
            threading.Event().wait(2.0)
            before = pings.count
            threading.Event().wait(SECONDS)
            return pings.count - before


def test_a_container_whose_deliveries_take_long_delays_no_other_for_long(
    start_daemon: StartDaemon, hostile: Plain, other: Plain
) -> None:
    assert served_beside_waiters(start_daemon, hostile, other) > 30 * SECONDS


def test_control_where_it_does_not_wait_it_does(start_daemon: StartDaemon, hostile: Plain, other: Plain) -> None:
    assert served_beside_waiters(start_daemon, hostile, other, "slow calls") < 30 * SECONDS


# ---- the relay's port, when graftd was killed or its listener closed -------------------------------------------------

THIEF = """
import socket, sys
thief = socket.socket()
thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
thief.bind(("127.0.0.1", int(sys.argv[1])))
thief.listen(5)
print("ready", flush=True)
accepted, _ = thief.accept()
print("stole", accepted.recv(100), flush=True)
"""
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")


def kill_the_daemon(container: Plain, _port: int) -> None:
    container.host.kill_daemon()


def stop_and_close(container: Plain, port: int) -> None:
    """Root of the namespace closes the listener, and graftd is not quick enough to make another one."""
    os.kill(container.daemon(), signal.SIGSTOP)
    container.netns.run("ss", "-K", "-tl", f"sport = :{port}")


ENDS = {"killed": kill_the_daemon, "closed": stop_and_close}


def is_robbed(host: Host, how: str) -> bool:
    """Whether a container's granted connection comes to a program that took the relay's port."""
    with plain(host) as container, host.client.listener(CLIENT4) as world:
        published(container)
        port, pid = container.described()["out"]["port"], container.daemon()
        ENDS[how](container, port)
        try:
            thief = container.start(*NOBODY, sys.executable, "-c", THIEF, port)
            thief.says("ready")
            with container.tcp() as victim:
                try:
                    victim.connect(world.getsockname())
                except ConnectionRefusedError:
                    return False
                victim.sendall(b"secret")
                thief.says("stole b'secret'")
                return True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("how", ENDS)
def test_nobody_who_takes_the_relays_port_gets_a_containers_connections(host: Host, how: str) -> None:
    assert not is_robbed(host, how)


@pytest.mark.parametrize("how", ENDS)
def test_control_where_the_hook_does_not_look_who_listens_he_does(without: Without, how: str) -> None:
    assert is_robbed(without("relay's mark"), how)


def test_a_relay_whose_listener_was_closed_listens_again(host: Host) -> None:
    with plain(host) as container, host.client.listener(CLIENT4) as world:
        published(container)
        port = container.described()["out"]["port"]
        container.netns.run("ss", "-K", "-tl", f"sport = :{port}")
        until("it listens again", lambda: container.described()["out"]["port"] != port)
        with container.tcp() as program:
            program.connect(world.getsockname())
            world.settimeout(15 * PATIENCE)
            accepted, _ = world.accept()
            with accepted:
                program.sendall(b"hello")
                assert accepted.recv(10) == b"hello"


# ---- the port of a container's listener that has just closed, in a shared namespace ----------------------------------


@contextlib.contextmanager
def in_one_place(host: Host, attached: bool) -> Iterator[tuple[Plain, Plain | None]]:
    """A container, and where ``attached`` another one that is served too."""
    with plain(host) as container, contextlib.ExitStack() as stack:
        yield container, stack.enter_context(plain(host)) if attached else None


def stolen(host: Host, attached: bool, without: bool = False) -> bytes:
    """What a client's first message is to a program of another cgroup that takes the port of a closed listener."""
    with in_one_place(host, attached) as (container, second):
        listener = container.listener()
        port = published(container)
        pid = container.daemon()
        if second is not None:
            published(second, bound="0.0.0.0:81")
        os.kill(pid, signal.SIGSTOP)
        try:
            listener.close()
            with contextlib.ExitStack() as stack:
                thief = stack.enter_context(socket_of(container, second))
                client = stack.enter_context(host.client.connected(HOST4, port))
                client.settimeout(15 * PATIENCE)
                client.sendall(b"secret")
                os.kill(pid, signal.SIGCONT)
                thief.settimeout(15 * PATIENCE)
                accepted, _ = thief.accept()
                accepted.settimeout(15 * PATIENCE)
                try:
                    return accepted.recv(10)
                except ConnectionResetError:
                    assert reset(client)
                    return b""
        finally:
            os.kill(pid, signal.SIGCONT)


def socket_of(container: Plain, second: Plain | None) -> socket.socket:
    """A listener at the container's port, of no container or of the second one, in the first one's namespace."""
    if second is None:
        with container.netns.inside():
            return socket.create_server(("0.0.0.0", 80))
    made = _made_in(second, container)
    made.bind(("0.0.0.0", 80))
    made.listen(5)
    return made


def _made_in(second: Plain, container: Plain) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        script = (
            "import socket, sys; s = socket.socket(); "
            "socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b'.'], [s.fileno()])"
        )
        enter = f'echo $$ > {second.cgroup}/cgroup.procs; exec "$@"'

        command = container.netns.command(sys.executable, "-c", script, str(theirs.fileno()))
        subprocess.run(["sh", "-c", enter, "sh", *command], pass_fds=[theirs.fileno()], check=True)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    return socket.socket(fileno=fds[0])


@pytest.mark.parametrize("attached", [False, True])
def test_an_endpoint_does_not_lead_to_who_takes_a_closed_listeners_port(host: Host, attached: bool) -> None:
    assert stolen(host, attached) == b""


def test_control_where_nobody_looks_it_does(start_daemon: StartDaemon, host: Host) -> None:
    start_daemon("far check")
    assert stolen(host, False) == b"secret"


def test_a_listener_that_defers_accept_is_served(host: Host) -> None:
    """The kernel gives it its connection with the first data only: until then no hook has said whose it is."""
    with plain(host) as container, container.listener() as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
        port = published(container)
        listener.settimeout(15 * PATIENCE)
        with host.client.connected(HOST4, port) as client:
            client.sendall(b"hello")
            accepted, peer = listener.accept()
            with accepted:
                assert accepted.recv(10) == b"hello"
                assert peer == client.getsockname()
