"""What a thirteenth reading found: a container's processes decided by their number of descriptors how long `graft
attach`, `ps` and `detach` search them, clients were served until `detach` had, and what was made meanwhile was not
listed.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.kernel import sockets
from graft.kernel.sockdiag import FoundSocket, parse_socket
from graft.state import inventory, members
from tests.hostile.conftest import graft_without
from tests.hostile.test_eighth_reading_folders import holder
from tests.hostile.test_twelfth_reading_attach import PYTHON, attach, in_cgroup
from tests.support.building import Programs
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.program import Program
from tests.support.shell import AS_NOBODY, Word
from tests.support.wait import until

pytestmark = pytest.mark.e2e

UNSEARCHED = "process {} does not let its sockets be listed in time: there may be more"
PROCESSES = 14
DESCRIPTORS = 20000


@contextlib.contextmanager
def unsearchable(host: Host, path: Path) -> Iterator[int]:
    """A process of the cgroup that holds its folder in /proc, so that a search takes all the time it may."""
    with in_cgroup(host, path, *holder("self")) as program:
        yield program.pid


# ---- how long processes are searched ---------------------------------------------------------------------------------


def said_of_many(host: Host, programs: Programs, without: str = "") -> str:
    """What `attach` says of a container whose processes are searched one after the other, for some 12 seconds."""
    count = min(DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    with new_cgroup("many") as path, ExitStack() as stack:
        for tables in range(1, PROCESSES + 1):
            stack.enter_context(in_cgroup(host, path, *AS_NOBODY, programs["many_tables"], tables, count))
        return attach(host, path, without)


def test_processes_with_very_many_descriptors_are_searched_for_seconds(host: Host, programs: Programs) -> None:
    assert "does not let its sockets be listed in time" in said_of_many(host, programs)


def test_control_where_they_are_searched_for_longer_they_all_are(host: Host, programs: Programs) -> None:
    assert "in time" not in said_of_many(host, programs, "search in time")


# ---- what is made while they are searched ----------------------------------------------------------------------------

MEANWHILE = """
import socket, sys
print("ready", flush=True)
sys.stdin.readline()
tcp = socket.create_connection((sys.argv[1], int(sys.argv[2])))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("0.0.0.0", int(sys.argv[3])))
print("made", flush=True)
tcp.recv(1)
"""


def long_child(program: Program) -> str:
    """The child that a command has had for a while, and waits for; "" where there is none."""
    children = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children")
    before = children.read_text()
    time.sleep(1)  # the other children of a command have answered by then
    return before if children.read_text() == before else ""


def made_meanwhile(host: Host, without: str = "") -> tuple[str, list[str]]:
    """What `attach` says, and what is to be in it."""
    tcp, udp = host.port(), host.port()
    with new_cgroup("meanwhile") as path, host.client.listener(CLIENT4, tcp), unsearchable(host, path):
        words: list[Word] = [*AS_NOBODY, PYTHON, "-ISc", MEANWHILE, CLIENT4, tcp, udp]
        with in_cgroup(host, path, *words) as program:
            assert program.stdin is not None and program.stdout is not None
            attaching = host.start_command([*graft_without(without), "attach", "--cgroup", path, "--deny"])
            threads = attaching.until("it looks at threads", lambda: long_child(attaching))
            attaching.until("it searches", lambda: long_child(attaching) not in ("", threads))
            program.stdin.write("\n")
            program.stdin.flush()
            assert program.stdout.readline() == "made\n"
            assert attaching.wait() == 0
            host.remove_at(path)
    return attaching.said, [f"with {CLIENT4}:{tcp} ", f"udp unconnected 0.0.0.0:{udp} "]


def test_what_is_made_while_processes_are_searched_is_listed(host: Host) -> None:
    said, made = made_meanwhile(host)
    _, _, late = said.partition("made while it was attached, which keep their addresses and connections:")
    assert [one for one in made if one not in late] == []
    assert late.count("which may receive nothing") == 1


def test_control_where_it_is_not_looked_for_it_is_not(host: Host) -> None:
    said, made = made_meanwhile(host, "made meanwhile")
    assert [one for one in made if one in said] == []


# ---- when a listener is closed ---------------------------------------------------------------------------------------

SERVER = """
import socket, sys
print("ready", flush=True)
sys.stdin.readline()
server = socket.create_server(("0.0.0.0", 8080))
print("listens", flush=True)
sys.stdin.readline()
"""


def closed_and_ended(host: Host, without: str = "") -> tuple[float, float, str]:
    """How long `detach` takes until a listener is closed, and after that until it ends, and what it says."""
    port = host.port()
    with new_cgroup("served") as path, in_cgroup(host, path, *AS_NOBODY, PYTHON, "-ISc", SERVER) as server:
        assert server.stdin is not None and server.stdout is not None
        host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:8080={host.endpoint(f'0.0.0.0:{port}')}")
        server.stdin.write("\n")
        server.stdin.flush()
        assert server.stdout.readline() == "listens\n"
        with unsearchable(host, path) as pid:
            seen = host.ps_of(path)
            assert seen["unsearched"] == [pid] and [one["pid"] for one in seen["sockets"]] == [server.pid]
            begun = time.monotonic()
            detaching = host.start_command([*graft_without(without), "detach", "--cgroup", path])
            until("the listener is closed", lambda: not host.netns.listens(port), 60)
            closed = time.monotonic()
            assert detaching.wait() == 0
            assert UNSEARCHED.format(pid) in detaching.said
            assert f"(process {server.pid}, bound as 0.0.0.0:8080 to " in detaching.said
            return closed - begun, time.monotonic() - closed, detaching.said


@pytest.mark.skipif(not sockets.can_destroy(), reason="it is closed through a descriptor, before 6.9")
def test_a_listener_is_closed_before_processes_are_searched(host: Host) -> None:
    before, after, _ = closed_and_ended(host)
    assert before < after


def test_control_where_it_is_closed_after_that_it_is_later(host: Host) -> None:
    before, after, _ = closed_and_ended(host, "closed by tag")
    assert before > after


# ---- sockets of strangers --------------------------------------------------------------------------------------------

STRANGERS = 400


def test_of_strangers_sockets_none_is_read(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it does not matter to `attach` how many there are."""
    read: list[int] = []

    def reads(protocol: int, message: bytes) -> FoundSocket:
        read.append(protocol)
        return parse_socket(protocol, message)

    monkeypatch.setattr(sockets, "parse_socket", reads)
    with ExitStack() as stack, new_cgroup("own") as path:
        with host.netns.inside():
            for _ in range(STRANGERS):
                stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).bind((HOST4, 0))
        with in_cgroup(host, path, *AS_NOBODY, PYTHON, "-ISc", SERVER) as server:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write("\n")
            server.stdin.flush()
            assert server.stdout.readline() == "listens\n"
            found = inventory.host_sockets_of(host.settings, members.inside(path))
            assert found is not None and [one.listed.local for one in found.sockets] == ["0.0.0.0:8080"]
    assert len(read) == 1
