"""What a fifteenth reading found: by TCP connections that all lie in one bucket of the kernel's table, which any user
of the host can have, the kernel's list of TCP sockets took longer than `ps`, `attach` and `detach` wait for it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graft.kernel import cgroup, sockets
from graft.kernel.sockets import Kind
from tests.hostile.conftest import Confine, graft_without
from tests.hostile.test_eighth_reading_folders import running
from tests.hostile.test_fourteenth_reading_listing import CLOSES, attached, detached, serving
from tests.hostile.test_sixth_reading import port_after
from tests.hostile.test_twelfth_reading_attach import PYTHON, attach
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import HOST4, Netns, namespace
from tests.support.shell import AS_NOBODY, output, run
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e

LIMIT = 10.0 * PATIENCE  # seconds for each command

# ---- connections in one bucket ---------------------------------------------------------------------------------------

SMALL_TABLE = pytest.mark.skipif(
    not Path("/proc/sys/net/ipv4/tcp_child_ehash_entries").exists(),
    reason="the kernel gives no namespace a small table of its own, before 6.1",
)
COUNT, BUCKETS = 20000, 8
MANY = """
import resource, os, signal, socket, sys
left, most = int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
while left > 0:
    some = min(left, most - 100)
    left -= some
    ours, theirs = os.pipe()
    if os.fork() == 0:
        server, kept = socket.create_server(("127.0.0.1", 0), backlog=4096), []
        for number in range(some):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((f"127.1.{number // 250}.{number % 250 + 1}", 5555))
            one.connect(server.getsockname())
            kept.append(one.detach())
            server.accept()[0].close()
        os.write(theirs, b"x")
        signal.pause()
    os.close(theirs)
    assert os.read(ours, 1) == b"x"
print("ready", flush=True)
signal.pause()
"""


@contextlib.contextmanager
def small_host() -> Iterator[Netns]:
    """A namespace whose table of TCP sockets has few buckets: it gets them of the one that makes it (ip-sysctl.rst)."""
    with namespace("outer") as outer:
        outer.run("sh", "-c", f"echo {BUCKETS} > /proc/sys/net/ipv4/tcp_child_ehash_entries")
        made = Netns(f"{outer.name}-small")
        outer.run("ip", "netns", "add", made.name)
        try:
            output(["ip", "-n", made.name, "link", "set", "lo", "up"])
            yield made
        finally:
            run(["ip", "netns", "del", made.name])


def seconds_of(list_them: Callable[[], object]) -> float:
    """The shortest of three."""
    taken = []
    for _ in range(3):
        begun = time.monotonic()
        list_them()
        taken.append(time.monotonic() - begun)
    return min(taken)


@SMALL_TABLE
def test_connections_of_a_stranger_do_not_count_where_those_of_a_cgroup_are_listed(host: Host) -> None:
    tags = host.maps.tags
    with small_host() as small, new_cgroup("stranger") as path:
        words = small.command(*AS_NOBODY, PYTHON, "-ISc", MANY, COUNT)
        with running(["sh", "-c", f'echo $$ > {path}/cgroup.procs; exec "$@"', "sh", *words]), small.inside():
            found = sockets.list_sockets(tags.fd, (Kind.TCP,))
            assert sum(map(len, found.messages.values())) >= COUNT
            everything = seconds_of(lambda: sockets.list_sockets(tags.fd, (Kind.TCP,)))
            assert seconds_of(lambda: sockets.list_sockets(tags.fd, (Kind.TCP,), (1,))) < everything / 5
            assert seconds_of(lambda: sockets.list_tcp(tags.fd, b"none", (1,))) < everything / 5
            with pytest.raises(TimeoutError):
                sockets.list_tcp(tags.fd, b"none", seconds=everything / 5)


# ---- a kernel that lists TCP sockets by their cgroups only -----------------------------------------------------------


def said_by_ps(host: Host, own: str, without: str) -> tuple[list[str] | None, list[str], float]:
    begun = time.monotonic()
    said = run([*graft_without(without), "ps", "--json"], environment=host.environment, status=0, timeout=100).stdout
    taken = time.monotonic() - begun
    [found] = [one for one in json.loads(said) if one["cgroup"] == own]
    states = None if found["sockets"] is None else sorted(one["state"] for one in found["sockets"])
    return states, found["unlisted"], taken


def test_ps_shows_a_containers_sockets_and_says_what_may_be_missing(host: Host) -> None:
    program, port = serving(host)
    with host.client.connected(HOST4, port):
        own = host.container(program).cgroup
        program.until("the connection is accepted", lambda: len(said_by_ps(host, own, "")[0] or ()) == 4)
        states, unlisted, taken = said_by_ps(host, own, "slow tcp")
        assert states == ["bound", "established", "listening", "unconnected"]
        assert unlisted == ["TCP", "bound TCP"] and taken < LIMIT
        assert said_by_ps(host, own, "tcp by cgroup")[0] is None, "where it asks for all, it shows none"


def test_attach_finds_what_a_container_has(host: Host) -> None:
    said, got, line = attached(host, "slow tcp", made_elsewhere=False)
    assert got and line in said and "may receive nothing" not in said
    assert "the kernel does not list all TCP sockets in time: there may be more" in said


def test_control_where_it_asks_for_all_it_cuts_them_off(host: Host) -> None:
    said, got, line = attached(host, "tcp by cgroup", made_elsewhere=False)
    assert not got and line not in said


HANDED = """
import os, signal, socket, sys
one = socket.create_server(("0.0.0.0", int(sys.argv[1])))
open(sys.argv[2] + "/cgroup.procs", "w").write("0")
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize(("without", "is_found"), [("slow tcp", True), ("tcp made elsewhere", False)])
def test_attach_looks_for_tcp_sockets_from_elsewhere_in_the_processes(host: Host, without: str, is_found: bool) -> None:
    port = host.port()
    with new_cgroup("served") as path, running(host.netns.command(PYTHON, "-ISc", HANDED, port, path)):
        said = attach(host, path, without)
        assert (f"tcp listening 0.0.0.0:{port}" in said) == is_found


@CLOSES
def test_detach_closes_what_was_granted(host: Host) -> None:
    begun = time.monotonic()
    said, received = detached(host, "slow tcp")
    assert time.monotonic() - begun < LIMIT + 5 * PATIENCE
    assert received == b""
    assert "all TCP sockets in time: there may be more" in said and "graft:" not in said


@CLOSES
def test_control_where_it_asks_for_all_it_closes_nothing(host: Host) -> None:
    said, received = detached(host, "tcp by cgroup")
    assert received is None
    assert "the kernel does not answer" in said


# ---- what was made in a cgroup that is gone --------------------------------------------------------------------------

HANDS_ON = """
import os, signal, socket, sys
parent, below = sys.argv[1:]
os.mkdir(below)
def enter(path):
    open(path + "/cgroup.procs", "w").write("0")
enter(below)
one = socket.create_server(("0.0.0.0", 8080))
enter(parent)
os.rmdir(below)
ours, theirs = socket.socketpair()
socket.send_fds(ours, [b"x"], [one.fileno()])
one.close()
print("ready", flush=True)
signal.pause()
"""


def detached_after(host: Host, below: str, without: str) -> tuple[subprocess.CompletedProcess[str], bool]:
    """What `detach` does when a container has a listener in a message only; and whether it listens then. ``below``: it
    was made in a cgroup of that name, which is gone.
    """
    port = host.port()
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    with new_cgroup("handing") as path:
        host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:8080={endpoint}")
        words = ["sh", "-c", f'echo $$ > {path}/cgroup.procs; exec "$@"', "sh"]
        program = HANDS_ON if below else HANDS_ON.replace("os.mkdir", "str").replace("os.rmdir", "str")
        place = path / below if below else path
        with running([*words, *host.netns.command(PYTHON, "-ISc", program, path, place)]):
            assert host.netns.listens(port)
            if below:
                assert cgroup.dying_below(path), "the socket keeps its cgroup for the kernel"
            said = run(
                [*graft_without(without), "detach", "--cgroup", path],
                environment=host.environment,
                status=None,
                timeout=100,
            )
            return said, host.netns.listens(port)


@CLOSES
def test_detach_says_when_something_may_be_open(host: Host) -> None:
    said, listens = detached_after(host, "below", "slow tcp")
    assert listens and said.returncode == 8
    assert "what was made there may still be open" in said.stderr


@CLOSES
@pytest.mark.parametrize(("below", "without"), [("below", ""), ("", "slow tcp")])
def test_otherwise_it_has_closed_all(host: Host, below: str, without: str) -> None:
    said, listens = detached_after(host, below, without)
    assert not listens and said.returncode == 0


@CLOSES
def test_control_where_it_does_not_look_for_such_cgroups_it_says_nothing(host: Host) -> None:
    said, listens = detached_after(host, "below", "gone cgroups")
    assert listens and said.returncode == 0


# ---- the end of a container ------------------------------------------------------------------------------------------


@CLOSES
@pytest.mark.parametrize(("without", "outcome"), [("slow tcp", "ok"), ("tcp by cgroup", "EADDRINUSE")])
def test_at_its_end_what_somebody_was_handed_is_closed(
    host: Host, confine: Confine, without: str, outcome: str
) -> None:
    """The second is the control: where it asks for all, nothing is closed."""
    assert port_after(host, confine, "exits", without) == f"bind {outcome}"
