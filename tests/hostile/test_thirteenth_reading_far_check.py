"""What a thirteenth reading found: a neighbour in the pod, of another user, had connections to a server reset by very
many listeners that take IPv6 only, which no IPv4 connection reaches.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from graft.kernel import cgroup
from graft.splice.far_check import FarCheck
from tests.hostile.test_daemon_shares import StartDaemon, start_daemon
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import HOST4, Netns
from tests.support.plain import plain
from tests.support.program import start
from tests.support.shell import AS_NOBODY, Word
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e

__all__ = ["start_daemon"]

MANY = 1025
NEIGHBOUR = """
import resource, signal, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
kept = []
def listen(v6only, device):
    one = socket.socket(socket.AF_INET6)
    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
    one.bind(("::", 8080)); one.listen(1); kept.append(one)
for _ in range(int(sys.argv[1])): listen(1, b"")
for device in sys.argv[2:]: listen(0, device.encode())  # the kernel lists them last
print("ready", flush=True)
signal.pause()
"""


@contextmanager
def neighbour(netns: Netns, v6only: int, *devices: str) -> Iterator[None]:
    """Another user's listeners at [::]:8080, in another cgroup: for IPv6 only, and for both at each device."""
    with new_cgroup("neighbour") as path:
        words: list[Word] = [*AS_NOBODY, "/usr/bin/python3", "-ISc", NEIGHBOUR, v6only, *devices]
        program = start([*in_cgroup(path), *netns.command(*words)])
        try:
            program.says("ready")
            yield
        finally:
            program.stop()


def first_byte(host: Host, v6only: int) -> bytes:
    """What a server gets that accepts a connection when its first byte has come (TCP_DEFER_ACCEPT)."""
    port = host.port()
    with plain(host) as container, ExitStack() as stack:
        server = stack.enter_context(container.listener("0.0.0.0", 8080))
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        container.attach("-i", f"0.0.0.0:8080={host.endpoint(f'0.0.0.0:{port}')}")
        stack.enter_context(neighbour(container.netns, v6only))
        container.until_published(port)
        server.settimeout(2.0 * PATIENCE)
        try:
            client = stack.enter_context(host.client.connected(HOST4, port))
            client.sendall(b"first")
            return stack.enter_context(server.accept()[0]).recv(100)
        except (TimeoutError, ConnectionResetError):
            return b""


def test_listeners_for_ipv6_only_have_no_ipv4_connection_reset(host: Host) -> None:
    assert first_byte(host, MANY) == b"first"


def test_control_where_they_are_counted_they_do(host: Host, start_daemon: StartDaemon) -> None:
    start_daemon("listeners counted")
    assert first_byte(host, MANY) == b""


@pytest.fixture
def judged(netns: Callable[[], Netns]) -> Callable[..., bool]:
    """Whether graftd takes a connection to 127.0.0.1:8080 for the container's (this process is), beside a neighbour's
    listeners. ``device``: what the container's listener at 0.0.0.0 is bound to.
    """

    def judge(v6only: int, *devices: str, device: str = "") -> bool:
        place = netns()
        place.run("ip", "link", "add", "other", "type", "veth", "peer", "name", "peer")
        with place.inside(), socket.socket() as server, neighbour(place, v6only, *devices):
            server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            server.bind(("0.0.0.0", 8080))
            server.listen()
            entered: Any = SimpleNamespace(run=lambda call: call())
            check = FarCheck(SimpleNamespace(arrivals=None), entered)  # type: ignore[arg-type]
            check.cgroups = {cgroup.cgroup_id(cgroup.of_process(os.getpid()))}
            try:
                return check._listens_alone(socket.AF_INET, "127.0.0.1", 8080)
            finally:
                check.close()

    return judge


@pytest.mark.parametrize("v6only", [0, 10, MANY])
def test_a_connection_is_the_containers_where_only_its_listener_takes_ipv4(
    judged: Callable[..., bool], v6only: int
) -> None:
    assert judged(v6only)


@pytest.mark.parametrize("v6only", [0, MANY])
def test_it_is_not_where_the_kernel_chooses_a_neighbours(judged: Callable[..., bool], v6only: int) -> None:
    """The two do not conflict, because they are bound to different interfaces."""
    assert not judged(v6only, "lo", device="other")
