"""No container can keep the relays' daemon from serving the others."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from graft.kernel import cgroup
from graft.splice import control
from tests.hostile.conftest import graft_without
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import Plain, plain
from tests.support.program import Program
from tests.support.relayed import pair, published, refused, talk
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

FEW = 1000
"""Descriptors of a daemon that is to run short of them: for about a hundred connections of one container."""
KNOCKS = 300
LISTENERS = 15_000
CHANGING = 1000

StartDaemon = Callable[..., Program]


@pytest.fixture
def start_daemon(host: Host) -> Iterator[StartDaemon]:
    """Starts the daemon, without a defence where one is named. It ends with the test."""
    started: list[Program] = []

    def begin(without: str = "", descriptors: int | None = None) -> Program:
        command = graft_without(without) if without else [GRAFT]
        started.append(host.start_daemon(command, descriptors))
        return started[-1]

    yield begin
    for program in started:
        program.process.terminate()
        program.process.wait(30)
        said = program.complained
        assert program.stop() == 0, said


@pytest.fixture
def hostile(host: Host, start_daemon: StartDaemon) -> Iterator[Plain]:
    """A container that takes all it can get. (It is detached before the daemon ends.)"""
    with plain(host) as made:
        yield made


@pytest.fixture
def other(host: Host, start_daemon: StartDaemon) -> Iterator[Plain]:
    """A container that is to be served all the same."""
    with plain(host) as made:
        yield made


def served(container: Plain, listener: socket.socket, port: int, within: float) -> bool:
    """Whether a new connection to a container reaches its listener, and bytes pass both ways."""
    listener.settimeout(within)
    with container.host.client.connected(HOST4, port) as client, contextlib.suppress(TimeoutError):
        accepted, whose = listener.accept()
        while whose != client.getsockname():  # a connection that an earlier call has given up
            accepted.close()
            accepted, whose = listener.accept()
        with accepted:
            for sock in (client, accepted):
                sock.settimeout(within)
            talk(client, accepted)
            return True
    return False


# ---- connections ----------------------------------------------------------------------------------


def through_its_endpoint(hostile: Plain, stack: contextlib.ExitStack, backlog: int) -> None:
    """Very many clients, for a listener with room for ``backlog`` of them that accepts none."""
    listener = stack.enter_context(hostile.listener())
    listener.listen(backlog)
    port = published(hostile)
    with hostile.host.client.inside():
        clients = [stack.enter_context(socket.socket()) for _ in range(KNOCKS)]
    for client in clients:
        client.setblocking(False)
        client.connect_ex((HOST4, port))


def to_the_world(hostile: Plain, stack: contextlib.ExitStack) -> None:
    """Very many outgoing connections."""
    world = stack.enter_context(hostile.host.client.listener(CLIENT4))
    world.listen(KNOCKS)
    published(hostile)
    for _ in range(KNOCKS):
        program = stack.enter_context(hostile.tcp())
        program.setblocking(False)
        program.connect_ex(world.getsockname())


WAYS: dict[str, Callable[[Plain, contextlib.ExitStack], None]] = {
    "in": lambda hostile, stack: through_its_endpoint(hostile, stack, 4096),
    "to a listener that never accepts": lambda hostile, stack: through_its_endpoint(hostile, stack, 1),
    "out": to_the_world,
}


def take_all(hostile: Plain, stack: contextlib.ExitStack, way: str) -> int:
    """Have a container take all the connections that it can get; gives how many those are."""
    WAYS[way](hostile, stack)
    seen = [-1, -1]

    def settled() -> bool:
        seen.append(hostile.described()["connections"])
        return seen[-1] > 0 and seen[-1] == seen[-2] == seen[-3]

    until("it has all that it gets", settled, pause=0.1)
    assert seen[-1] < KNOCKS
    return seen[-1]


@pytest.mark.parametrize("way", WAYS)
def test_a_container_that_takes_all_connections_leaves_the_others_theirs(
    start_daemon: StartDaemon, hostile: Plain, other: Plain, way: str
) -> None:
    start_daemon(descriptors=FEW)
    with contextlib.ExitStack() as stack, other.listener() as listener:
        port = published(other)
        take_all(hostile, stack, way)
        assert all(served(other, listener, port, 15 * PATIENCE) for _ in range(5))


@pytest.mark.parametrize("way", WAYS)
def test_control_with_one_limit_for_all_the_others_get_none(
    start_daemon: StartDaemon, hostile: Plain, other: Plain, way: str
) -> None:
    start_daemon("shares", FEW)
    with contextlib.ExitStack() as stack, other.listener() as listener:
        port = published(other)
        take_all(hostile, stack, way)
        assert not served(other, listener, port, 1.0)
        stack.close()  # when those connections are closed, the next client is served
        assert until("served", lambda: served(other, listener, port, 1.0))


def test_a_container_that_comes_when_all_is_taken_is_served(
    start_daemon: StartDaemon, hostile: Plain, other: Plain
) -> None:
    start_daemon(descriptors=FEW)
    with contextlib.ExitStack() as stack, other.listener() as listener:
        take_all(hostile, stack, "in")
        port = published(other)
        assert all(served(other, listener, port, 15 * PATIENCE) for _ in range(5))


# ---- listeners ------------------------------------------------------------------------------------

MANY = f"""
import resource, socket, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
listeners = []
for number in range({LISTENERS}):
    listeners.append(socket.socket())
    listeners[-1].bind(("127.0.0.1", 20000 + number))
    listeners[-1].listen(1)
print("ready", flush=True)
time.sleep(1000)
"""
CHANGE = f"""
import resource, socket, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
ready = "ready"
while True:
    for first in (20000, 30000):
        listeners = [socket.socket() for _ in range({CHANGING})]
        for number, sock in enumerate(listeners):
            sock.bind(("0.0.0.0", first + number))
            sock.listen(1)
        print(ready, end="", flush=True)
        ready = ""
        time.sleep(0.05)
        for sock in listeners:
            sock.close()
"""
STORMS = {"many": MANY, "changing": CHANGE}
WITH_TURNS, WITHOUT_TURNS = 3, 4
"""How often a container is served for each scan of the other's listeners: with turns at least (4 on a busy machine, 70
on an idle one), without at most (0.5 and 3).
"""


class Pings:
    """Counts how often a container is served while the block runs: a new connection, with a message each way."""

    def __init__(self, container: Plain, listener: socket.socket, port: int) -> None:
        self._container, self._listener, self._port = container, listener, port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ping)
        self.count = 0

    def _ping(self) -> None:
        while not self._stop.is_set():
            client, accepted = pair(self._container, self._listener, self._port)
            with client, accepted:
                client.sendall(b"?")
                accepted.sendall(accepted.recv(1))
                self.count += client.recv(1) == b"?"

    def __enter__(self) -> Pings:
        self._thread.start()
        until("the first ping", lambda: self.count)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def served_in_a_storm(start_daemon: StartDaemon, hostile: Plain, other: Plain, storm: str, without: str = "") -> float:
    """How often one container is served while the daemon looks once at the listeners of another one."""
    start_daemon(without)
    looks = 4
    dynamic = hostile.host.endpoint("0.0.0.0:dynamic")
    hostile.start(sys.executable, "-c", STORMS[storm]).says("ready", 60)
    hostile.attach("-i", f"0.0.0.0:20000-40000={dynamic}")
    with other.listener() as listener:
        listener.settimeout(30 * PATIENCE)
        with Pings(other, listener, published(other)) as pings:
            before = pings.count
            for _ in range(looks):
                control.ask(hostile.host.settings, {"do": "attach", "container": hostile.container.id})
            return (pings.count - before) / looks


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
@pytest.mark.parametrize("storm", STORMS)
def test_very_many_listeners_delay_no_other_container(
    start_daemon: StartDaemon, hostile: Plain, other: Plain, storm: str
) -> None:
    assert served_in_a_storm(start_daemon, hostile, other, storm) > WITH_TURNS


@pytest.mark.parametrize("storm", STORMS)
def test_control_without_turns_they_delay_the_others(
    start_daemon: StartDaemon, hostile: Plain, other: Plain, storm: str
) -> None:
    assert served_in_a_storm(start_daemon, hostile, other, storm, "turns") < WITHOUT_TURNS


def test_the_daemons_answer_about_very_many_listeners_is_cut(start_daemon: StartDaemon, hostile: Plain) -> None:
    start_daemon()
    hostile.start(sys.executable, "-c", MANY).says("ready", 60)
    said = hostile.host.graft("attach", "--cgroup", hostile.cgroup).stdout
    assert said.count("no rule for its listener") == 64
    assert f"and for {LISTENERS - 64} more" in said


# ---- the installation's lock ------------------------------------------------------------------------


@contextlib.contextmanager
def locked_while_one_ends(host: Host) -> Iterator[None]:
    """The test has the installation's lock, and a container has ended whose rules the daemon has to remove."""
    with plain(host) as third, open(host.settings.run_dir / "lock") as lock:
        published(third)
        fcntl.flock(lock, fcntl.LOCK_EX)
        cgroup.kill(third.cgroup)
        third.process.wait()
        cgroup.remove(third.cgroup)
        number = third.container.id
        yield
        assert third.container.id == number  # its record waits for the lock
        fcntl.flock(lock, fcntl.LOCK_UN)
        third.cgroup.mkdir()


def test_relays_do_not_wait_for_the_installations_lock(start_daemon: StartDaemon, other: Plain, host: Host) -> None:
    program = start_daemon()
    with other.listener() as listener:
        port = published(other)
        with locked_while_one_ends(host):
            program.until("the daemon sees that it ended", lambda: "no longer served" in program.complained)
            assert served(other, listener, port, 15 * PATIENCE)


def test_control_a_daemon_that_waits_for_it_in_its_loop_serves_none(
    start_daemon: StartDaemon, other: Plain, host: Host
) -> None:
    start_daemon("aside")
    with other.listener() as listener:
        port = published(other)
        with locked_while_one_ends(host):
            until("the daemon waits", lambda: not served(other, listener, port, 1.0))
        assert until("served", lambda: served(other, listener, port, 1.0))


# ---- a cgroup of the same path ----------------------------------------------------------------------

HELLO = """
import contextlib, socket
listener = socket.create_server(("0.0.0.0", 80))
print("ready", flush=True)
while True:
    accepted, _ = listener.accept()
    with accepted, contextlib.suppress(OSError):
        accepted.sendall(b"hello")
"""


def replace_cgroup(container: Plain, running: Program) -> None:
    """End the container's processes, and start others in a new cgroup of the same path, before the daemon sees it."""
    os.kill(running.process.pid, signal.SIGSTOP)
    try:
        cgroup.kill(container.cgroup)
        container.process.wait()
        cgroup.remove(container.cgroup)
        container.cgroup.mkdir()
        container.start(sys.executable, "-c", HELLO).says("ready")
    finally:
        os.kill(running.process.pid, signal.SIGCONT)


def hello(container: Plain, port: int) -> bool:
    """Whether what listens in a container is reached at an endpoint's port."""
    with contextlib.suppress(ConnectionError), container.host.client.connected(HOST4, port) as client:
        return client.recv(10) == b"hello"
    return False


def test_a_new_cgroup_at_the_same_path_does_not_get_the_old_ones_relay(
    start_daemon: StartDaemon, hostile: Plain
) -> None:
    running = start_daemon()
    with hostile.listener():
        port = published(hostile)
    replace_cgroup(hostile, running)
    until("the old rules are gone", lambda: not hostile.host.maps.containers.keys())
    assert refused(hostile, port)
    assert hello(hostile, published(hostile))
    assert refused(hostile, port)


def test_a_new_cgroup_that_is_attached_at_once_gets_a_relay_of_its_own(
    start_daemon: StartDaemon, hostile: Plain
) -> None:
    running = start_daemon()
    port = hostile.host.port()
    rule = f"0.0.0.0:80={hostile.host.endpoint(f'0.0.0.0:{port}')}"
    with hostile.listener():
        before = hostile.attach("-i", rule).id
    replace_cgroup(hostile, running)
    assert hostile.attach("-i", rule).id != before
    assert hello(hostile, port)


def test_control_a_daemon_that_knows_cgroups_by_path_serves_the_new_one(
    start_daemon: StartDaemon, hostile: Plain
) -> None:
    running = start_daemon("cgroup id")
    with hostile.listener():
        port = published(hostile)
    replace_cgroup(hostile, running)
    assert until("reached by the old rules", lambda: hello(hostile, port))
