"""What an eighteenth reading found about transport splice: graftd's own sockets for a container did by the policy's
default what no rule grants; a container kept a narrower policy from being saved; `graft detach` took a socket for
graftd's whose cgroup had been removed.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from graft.commands.policy_apply import replace_policy
from graft.kernel import cgroup
from graft.policy.model import policy_from_flags
from tests.hostile.conftest import Without
from tests.hostile.test_twelfth_reading_attach import in_cgroup
from tests.support.cgroups import new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4
from tests.support.plain import Plain, plain
from tests.support.shell import AS_NOBODY
from tests.support.udp import udp
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

ELSEWHERE = "192.0.2.7"
DEFENCE = "no default for graftd"


@contextmanager
def container_without(host: Host, without: Without, defence: str) -> Iterator[Plain]:
    """A container of a host whose hooks lack a defence, "": have all."""
    with plain(without(defence) if defence else host) as made:
        yield made


def heard(sock: socket.socket, far: socket.socket, seconds: float) -> int:
    """How many datagrams arrive of those that the socket sends for so long."""
    count, end = 0, time.monotonic() + seconds
    far.settimeout(0.1)
    while time.monotonic() < end:
        try:
            sock.send(b"secret")
            count += far.recv(100) == b"secret"
        except OSError:
            time.sleep(0.02)
    return count


@pytest.mark.parametrize("defence", ["", DEFENCE])
@pytest.mark.parametrize("gone", ["rule", "endpoint"])
@pytest.mark.parametrize("address", [CLIENT4, CLIENT6])
def test_a_connected_udp_socket_sends_no_more_when_its_rule_is_gone(
    host: Host, without: Without, address: str, gone: str, defence: str
) -> None:
    with container_without(host, without, defence) as container:
        serving = container.host
        out = serving.endpoint("[::]:dynamic" if ":" in address else "0.0.0.0:dynamic")
        rest = f"{ELSEWHERE}={serving.endpoint('0.0.0.0:dynamic')}"
        container.attach("-e", f"{address}={out}", "-e", rest)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with closing(udp(serving.client, address)) as far, container.udp(family) as sock:
            sock.connect((address, far.getsockname()[1]))
            assert heard(sock, far, 1)
            if gone == "rule":
                container.attach("-e", rest)
            else:
                serving.graft("ep", "del", out, "--force")
            heard(sock, far, 1)  # what was on its way
            assert (heard(sock, far, 2) == 0) == (not defence)


@pytest.mark.parametrize("defence", ["", DEFENCE])
def test_a_server_answers_nobody_by_graftd_without_an_egress_rule(host: Host, without: Without, defence: str) -> None:
    """It tries every address that may stand for its client at graftd's port, which /proc/net/udp tells it."""
    with container_without(host, without, defence) as container:
        port, server = container.host.port(), container.udp()
        server.bind(("0.0.0.0", 53))
        container.attach("-i", f"0.0.0.0:53={container.host.endpoint(f'0.0.0.0:{port}')}")
        with server, closing(udp(container.host.client, CLIENT4)) as client:
            client.sendto(b"question", (HOST4, port))
            _, peer = server.recvfrom(100)
            assert peer == client.getsockname()
            send_to_each_client_of(container, server)
            client.settimeout(2 * PATIENCE)
            try:
                assert client.recv(100) == b"answer" and defence
            except TimeoutError:
                assert not defence


def send_to_each_client_of(container: Plain, server: socket.socket) -> None:
    """An answer to all that the first slot may have been (bpf/exchange.bpf.c)."""
    lines = container.netns.run("cat", "/proc/net/udp").splitlines()[1:]
    for relay in {int(line.split()[1].split(":")[1], 16) for line in lines} - {53}:
        for generation in range(1, 2047):
            address = socket.inet_ntoa(struct.pack("!I", 127 << 24 | generation << 12))
            try:
                server.sendto(b"answer", (address, relay))
            except OSError:
                pass


FIRST, COUNT = 900, 800
LISTENS = f"""
import select, socket
waiting, have = set(range({FIRST}, {FIRST + COUNT})), []
print("begun", flush=True)
while True:
    for port in sorted(waiting):
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(("0.0.0.0", port))
            made.listen()
        except OSError:
            continue
        have.append(made)
        waiting.discard(port)
    for one in select.select(have, [], [], 0.1)[0]:
        one.accept()[0].close()
"""


def ungranted_after_a_change(container: Plain) -> set[int]:
    """Ports of the container's own at which the host listens: graftd publishes them, and their rule is taken away."""
    host, base = container.host, container.host.ports(COUNT)
    several = host.endpoint(f"0.0.0.0:{base}-{base + COUNT - 1}")
    rule, out = f"0.0.0.0:{FIRST}-{FIRST + COUNT - 1}={several}", f"{ELSEWHERE}={host.endpoint('0.0.0.0:dynamic')}"
    container.attach("-i", rule, "-e", out)
    program = container.start(sys.executable, "-c", LISTENS)
    program.says("begun")
    until("graftd publishes", lambda: host.netns.listening_ports() & set(range(base, base + COUNT)), pause=0)
    with host.installation as graft:
        narrow = replace_policy(graft, container.container, policy_from_flags("p", [], [out], False))
        replace_policy(graft, narrow, policy_from_flags("p", [rule], [out], False))
    own, endpoints = set(range(FIRST, FIRST + COUNT)), set(range(base, base + COUNT))
    until("all are published", lambda: len(host.netns.listening_ports() & (own | endpoints)) >= COUNT, timeout=60)
    program.stop()
    return host.netns.listening_ports() & own


@pytest.mark.timeout(300)
@pytest.mark.parametrize("defence", ["", DEFENCE])
def test_graftd_listens_at_no_port_of_the_host_that_is_the_containers(
    host: Host, without: Without, defence: str
) -> None:
    for _ in range(5):
        with container_without(host, without, defence) as container:
            if ungranted_after_a_change(container):
                assert defence
                return
        if not defence:
            return
    pytest.fail("the control shows nothing: no policy was replaced at the right time")


def test_a_narrower_policy_is_saved_at_once_whatever_graftd_does(host: Host) -> None:
    """A container that opens and closes hundreds of ports can have graftd take its time; here it is stopped."""
    host = host.saving
    with plain(host) as container:
        rule, other = f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}", host.endpoint("0.0.0.0:dynamic")
        container.attach("-i", rule, "-e", f"{ELSEWHERE}={other}")
        graftd = container.daemon()
        os.kill(graftd, signal.SIGSTOP)
        try:
            narrows = host.start_command([GRAFT, "attach", "--cgroup", container.cgroup, "-i", rule])
            until("it is in force", lambda: not list(host.maps.egress.keys()))
            until("it is saved", lambda: ELSEWHERE not in host.graft("export").stdout)
            host.graft("ep", "add", "bystander", "127.0.0.1:dynamic", timeout=10)
            assert narrows.process.poll() is None
        finally:
            os.kill(graftd, signal.SIGCONT)
        assert narrows.process.wait(60 * PATIENCE) == 0


SERVICE = """
import ctypes, socket, sys
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
print("ready", flush=True)
sys.stdin.readline()
assert ctypes.CDLL(None, use_errno=True).unshare(0x50000000) == 0
print("left", flush=True)
sys.stdin.readline()
sock.bind(("0.0.0.0", 8080))
sock.listen()
print("listens", flush=True)
client, _ = sock.accept()
while True:
    client.sendall(client.recv(100))
"""


def answer(program: subprocess.Popen[str]) -> str:
    """Let it go on; its next line."""
    assert program.stdin is not None and program.stdout is not None
    program.stdin.write("go\n")
    program.stdin.flush()
    return program.stdout.readline().strip()


@pytest.mark.parametrize("below", [True, False])
def test_detach_closes_a_socket_that_was_made_in_a_cgroup_that_is_gone(host: Host, below: bool) -> None:
    """A service makes it in a cgroup below its own, which is removed; then it leaves the host's namespace."""
    port = host.port()
    with new_cgroup("service") as path:
        folder = path / "below"
        folder.mkdir()
        with in_cgroup(host, folder if below else path, *AS_NOBODY, sys.executable, "-c", SERVICE) as program:
            for pid in cgroup.processes(folder):
                (path / "cgroup.procs").write_text(str(pid))
            folder.rmdir()
            assert answer(program) == "left"
            rule = f"0.0.0.0:8080={host.endpoint(f'0.0.0.0:{port}')}"
            assert "transport splice" in host.graft("attach", "--cgroup", path, "-i", rule, "--deny").stdout
            assert answer(program) == "listens"
            with host.client.inside():
                client = socket.create_connection((HOST4, port), 5 * PATIENCE)
            with client:
                client.sendall(b"1")
                assert client.recv(10) == b"1"
                host.graft("detach", "--cgroup", path)
                assert not host.netns.listens(port)
                with suppress(OSError):
                    client.sendall(b"2")
                    assert client.recv(10) != b"2"
            cgroup.kill(path)
