"""What a fourteenth reading found: by very many sockets at one port, which any user of the host can have, the kernel's
list of TCP sockets took minutes, and what needs that list waited for it or did without.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.kernel import cgroup, sockets
from graft.kernel.sockets import Kind
from tests.hostile.conftest import graft_without
from tests.hostile.test_eighth_reading_folders import running
from tests.hostile.test_listener import can_connect, container, end, send
from tests.hostile.test_twelfth_reading_attach import PYTHON, attach, in_cgroup
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import HOST4, namespace
from tests.support.program import Program
from tests.support.shell import AS_NOBODY, run
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e

LISTS_BOUND = pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 8), reason="the kernel lists no bound sockets, before 6.8"
)
CLOSES = pytest.mark.skipif(not sockets.can_destroy(), reason="nothing is closed that a container has left, before 6.9")

# ---- very many sockets of a stranger ---------------------------------------------------------------------------------

COUNT = 30000
MANY = """
import os, resource, signal, socket, sys
kind, port, left = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
while left > 0:
    some = min(left, most - 100)
    left -= some
    ours, theirs = os.pipe()
    if os.fork() == 0:
        kept = []
        for number in range(left, left + some):
            if kind == "udp":
                one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                one.bind((f"127.1.{number // 256}.{number % 256}", port))
            else:
                one = socket.socket()
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                one.bind(("127.0.0.1", port))
            kept.append(one.detach())
        os.write(theirs, b"x")
        signal.pause()
    os.close(theirs)
    assert os.read(ours, 1) == b"x"
print("ready", flush=True)
signal.pause()
"""


@contextlib.contextmanager
def stranger(host: Host, kind: str) -> Iterator[None]:
    """A user's sockets at one port, in a cgroup of his own."""
    with (
        new_cgroup("stranger") as path,
        in_cgroup(host, path, *AS_NOBODY, PYTHON, "-ISc", MANY, kind, host.port(), COUNT),
    ):
        yield


def listed_in(host: Host, kind: Kind, cgroups: tuple[int, ...] | None = None) -> tuple[float, int]:
    """How long a listing takes, the shortest of three, and how many sockets it has."""
    taken, tags = [], host.maps.tags
    with host.netns.inside():
        for _ in range(3):
            begun = time.monotonic()
            listing = sockets.list_sockets(tags.fd, (kind,), cgroups)
            taken.append(time.monotonic() - begun)
    return min(taken), sum(map(len, listing.messages.values()))


@LISTS_BOUND
def test_bound_sockets_of_a_stranger_do_not_count_where_they_are_not_needed(host: Host) -> None:
    with stranger(host, "bound"):
        everything, count = listed_in(host, Kind.BOUND)
        assert count >= COUNT
        for taken, count in (listed_in(host, Kind.TCP), listed_in(host, Kind.BOUND, (1,))):
            assert count < COUNT and taken < everything / 5


def test_udp_sockets_of_a_stranger_do_not_count_where_those_of_a_cgroup_are_listed(host: Host) -> None:
    with stranger(host, "udp"):
        everything, count = listed_in(host, Kind.UDP)
        assert count >= COUNT
        taken, count = listed_in(host, Kind.UDP, (1,))
        assert not count and taken < everything / 3


def ran_in(host: Host, without: str = "") -> float:
    """How long `graft run -- true` takes."""
    begun = time.monotonic()
    command = [*graft_without(without), "run", *host.run_flags, "--", "true"]
    run(command, environment=host.environment, status=0, timeout=100)
    return time.monotonic() - begun


@LISTS_BOUND
@CLOSES
def test_graft_run_does_not_wait_for_a_strangers_bound_sockets(host: Host) -> None:
    with stranger(host, "bound"):
        everything, _ = listed_in(host, Kind.BOUND)
        taken = min(ran_in(host) for _ in range(2))
        control = min(ran_in(host, "bound apart in process") for _ in range(2))
        assert taken < control - everything / 2, "where they are listed too, it does"


# ---- a kernel that does not list TCP sockets in time -----------------------------------------------------------------

SOON = 30.0  # seconds


@CLOSES
def test_the_end_of_a_container_does_not_wait_for_a_listing(host: Host) -> None:
    assert ran_in(host, "silent listing") < SOON * PATIENCE


@CLOSES
def test_control_where_its_supervisor_lists_itself_it_does(host: Host) -> None:
    program = host.start_command(
        [*graft_without("silent listing in process"), "run", *host.run_flags, "--", "echo", "it runs"]
    )
    program.says("it runs")
    made = host.cgroup / f"run-{program.process.pid}"
    with pytest.raises(subprocess.TimeoutExpired):
        program.process.wait(8)
    program.process.kill()
    program.process.wait()
    cgroup.kill(made)
    cgroup.remove(made)


def listen_attaches(host: Host, folder: Path, without: str, seconds: float) -> bool:
    """Whether `graft listen` attaches a container within some seconds after another one has ended."""
    (folder / "policy.yaml").write_text("name: p\n")
    (folder / "config.json").write_text(json.dumps({"annotations": {"graft.policy": str(folder / "policy.yaml")}}))
    serving = host.start_command([*graft_without(without), "listen"])
    serving.until("graft listen listens", lambda: can_connect(host.settings.run_dir / "listener"))
    with ExitStack() as stack:
        inside = stack.enter_context(namespace("inside"))
        with inside.inside():
            first, one = stack.enter_context(container(stack.enter_context(new_cgroup("first"))))
            other, two = stack.enter_context(container(stack.enter_context(new_cgroup("other"))))
        send(host, "first", first, folder, [one])
        serving.says("first: attached")
        end(first)
        serving.until("its end is seen", lambda: not any(found["name"] == "first" for found in host.ps()))
        send(host, "other", other, folder, [two])
        try:
            serving.says("other: attached", seconds / PATIENCE)
        except AssertionError:
            serving.process.kill()  # it waits for ever
            return False
        return True


@CLOSES
def test_graft_listen_does_not_wait_for_a_listing(host: Host, tmp_path: Path) -> None:
    assert listen_attaches(host, tmp_path, "silent listing", SOON * PATIENCE)


@CLOSES
def test_control_where_graft_listen_lists_itself_it_does(host: Host, tmp_path: Path) -> None:
    assert not listen_attaches(host, tmp_path, "silent listing in process", 5)


# ---- what `attach` finds where the kernel lists UDP sockets by their cgroups only ------------------------------------

ECHO = """
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", int(sys.argv[1])))
if len(sys.argv) > 2:
    open(sys.argv[2] + "/cgroup.procs", "w").write("0")
print("ready", flush=True)
while True:
    udp.recv(100)
    print("got", flush=True)
"""


def receives(host: Host, server: subprocess.Popen[str], port: int) -> bool:
    """Whether a UDP server on the host receives a datagram from a client."""
    assert server.stdout is not None
    with host.client.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _ in range(2):
            one.sendto(b"x", (HOST4, port))
            if select.select([server.stdout], [], [], PATIENCE)[0]:
                return server.stdout.readline() == "got\n"
    return False


@contextlib.contextmanager
def served(host: Host, path: Path, port: int, made_elsewhere: bool) -> Iterator[subprocess.Popen[str]]:
    """A UDP server in a cgroup, the socket of which was made there, or before the process came there."""
    if made_elsewhere:
        with running(host.netns.command(PYTHON, "-ISc", ECHO, port, path)) as server:
            yield server
    else:
        with in_cgroup(host, path, *AS_NOBODY, PYTHON, "-ISc", ECHO, port) as server:
            yield server


def attached(host: Host, without: str, made_elsewhere: bool) -> tuple[str, bool, str]:
    """What `attach` says, whether the server's socket receives then, and how `attach` is to name it."""
    port = host.port()
    with new_cgroup("served") as path, served(host, path, port, made_elsewhere) as server:
        assert receives(host, server, port)
        with_policy = [*graft_without(without), "attach", "--cgroup", path, "--deny"]
        said = run(with_policy, environment=host.environment, status=0, timeout=100).stdout
        got = receives(host, server, port)
        host.remove_at(path)
        return said, got, f"udp unconnected 0.0.0.0:{port} (process {server.pid})"


@pytest.mark.parametrize("made_elsewhere", [False, True])
def test_attach_finds_a_containers_udp_sockets_beside_any_number_of_others(host: Host, made_elsewhere: bool) -> None:
    said, got, line = attached(host, "slow listing", made_elsewhere)
    assert got and line in said and "may receive nothing" not in said
    assert "the kernel does not list all bound TCP sockets in time: there may be more" in said
    assert "all UDP sockets" not in said


@pytest.mark.parametrize(("defence", "made_elsewhere"), [("by cgroup", False), ("made elsewhere", True)])
def test_control_where_they_are_not_looked_for_they_are_not_found(
    host: Host, defence: str, made_elsewhere: bool
) -> None:
    said, got, line = attached(host, defence, made_elsewhere)
    assert line not in said
    assert got == made_elsewhere, "the hooks see the packets of sockets that were made in the container's cgroup"


# ---- what `detach` closes and `ps` shows -----------------------------------------------------------------------------

SERVER = """
import signal, socket
server = socket.create_server(("0.0.0.0", 8080))
bound = socket.socket()
bound.bind(("0.0.0.0", 8081))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", 8082))
print("ready", flush=True)
one = server.accept()[0]
signal.pause()
"""


def serving(host: Host) -> tuple[Program, int]:
    """A container with a listener, a socket that is only bound, and a UDP socket; and the listener's port."""
    ports = [host.port() for _ in range(3)]
    rules = [f"0.0.0.0:{8080 + index}={host.endpoint(f'0.0.0.0:{port}')}" for index, port in enumerate(ports)]
    words = [word for rule in rules for word in ("-i", rule)]
    program = host.start(*words, "--user", "nobody", "--", PYTHON, "-ISc", SERVER)
    program.says("ready")
    return program, ports[0]


def detached(host: Host, without: str) -> tuple[str, bytes | None]:
    """What `detach` says; and what a client of the container receives: nothing at the connection's end, None while it
    is open.
    """
    program, port = serving(host)
    name = host.container(program).name
    with host.client.connected(HOST4, port) as client:
        said = run(
            [*graft_without(without), "detach", "--cgroup", name],
            environment=host.environment,
            status=None,
            timeout=100,
        )
        client.settimeout(PATIENCE)
        try:
            return said.stdout + said.stderr, client.recv(1)
        except TimeoutError:
            return said.stdout + said.stderr, None
        except ConnectionResetError:
            return said.stdout + said.stderr, b""


@CLOSES
def test_detach_closes_what_was_granted_without_a_list_of_bound_sockets(host: Host) -> None:
    said, received = detached(host, "slow listing")
    assert received == b""
    assert "all bound TCP sockets in time" in said
    closed, _, rest = said.partition("still open")
    assert "udp unconnected" in closed and "tcp bound" in rest


@CLOSES
def test_control_where_the_kernel_lists_nothing_it_is_open(host: Host) -> None:
    said, received = detached(host, "listing")
    assert received is None
    assert "the kernel does not answer" in said


@LISTS_BOUND
def test_ps_shows_the_others_and_says_what_is_missing(host: Host) -> None:
    program, _ = serving(host)
    own, shown = host.container(program).cgroup, {}
    for without in ("", "slow listing", "silent kinds"):
        said = run(
            [*graft_without(without), "ps", "--json"], environment=host.environment, status=0, timeout=100
        ).stdout
        [found] = [one for one in json.loads(said) if one["cgroup"] == own]
        shown[without] = (sorted(one["state"] for one in found["sockets"]), found["unlisted"])
    assert shown == {
        "": (["bound", "listening", "unconnected"], []),
        "slow listing": (["bound", "listening", "unconnected"], ["bound TCP"]),
        "silent kinds": (["listening", "unconnected"], ["bound TCP", "UDP"]),
    }


def test_attach_names_what_it_lacks(host: Host) -> None:
    with new_cgroup("own") as path, in_cgroup(host, path, *AS_NOBODY, PYTHON, "-ISc", ECHO, host.port()):
        said = attach(host, path, "silent kinds")
    assert "the kernel does not list all UDP sockets in time: there may be more" in said
