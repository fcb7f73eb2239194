"""What the twenty-sixth reading found of datagrams: where one thread sends to its socket's peer and another connects it
anew, the kernel mixes the port, the address and the source of two peers, and asks no hook about the mixture.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hostile.conftest import TRANSPORTS, Without, for_transport
from tests.hostile.test_afterwards import OTHER4
from tests.hostile.test_datagrams import datagrams
from tests.hostile.test_more_ways import give_another_address
from tests.hostile.test_sixth_reading import OTHER6
from tests.support.building import Programs
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.program import Program
from tests.support.shell import AS_NOBODY, Word
from tests.support.wait import PATIENCE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

SHORT, LONG = 4, 30
"""Seconds for which the defended and, at most, the undefended one are attacked."""

SEGMENTS = (17, 103, 2, 100, 300)
"""Control messages that take the kernel time, and for which it asks no hook: SOL_UDP, UDP_SEGMENT."""
HOPS = {4: (0, 2, 4, 64, 300), 6: (41, 52, 4, 64, 300)}
"""Some for which it asks: IP_TTL, IPV6_HOPLIMIT."""


@dataclass(frozen=True, slots=True)
class Family:
    """Addresses: of the client, one where nobody is, and two of the host's."""

    client: str
    nobody: str
    one: str
    other: str
    any: str


FAMILIES = {
    4: Family(CLIENT4, "10.98.0.99", HOST4, OTHER4, "0.0.0.0"),
    6: Family(CLIENT6, "fd98::99", f"[{HOST6}]", f"[{OTHER6}]", "[::]"),
}


@dataclass(frozen=True, slots=True)
class Arena:
    """Where the program runs."""

    host: Host
    programs: Programs
    folder: Path

    @contextmanager
    def mixing(self, transport: str, policy: str, *words: Word) -> Iterator[Program]:
        """tests/programs/mixing.c under that policy, for as long as the block."""
        file = self.folder / f"{transport}.yaml"
        file.write_text(for_transport(transport, policy))
        command = [self.programs["mixing"], *words]
        if transport != "direct":
            program = self.host.start("--policy", file, "--user", "nobody", "--", *command)
            try:
                yield program
            finally:
                program.process.kill()
                program.wait()
            return
        with new_cgroup("mixing") as path:
            self.host.graft("attach", "--cgroup", path, "--policy", file)
            program = self.host.start_command([*in_cgroup(path), *self.host.netns.command(*AS_NOBODY, *command)])
            try:
                yield program
            finally:
                program.process.kill()
                program.wait()
                self.host.remove_at(path)


def arrives(program: Program, far: socket.socket, granted: str = "") -> bool:
    """Whether a datagram arrives there before the program ends, from another address than the ``granted`` one."""
    far.settimeout(0.1)
    deadline = time.monotonic() + LONG * 2 * PATIENCE
    while time.monotonic() < deadline:
        has_ended = program.process.poll() is not None
        try:
            while far.recvfrom(64)[1][0] == granted:
                pass
            return True
        except TimeoutError:
            if has_ended:
                assert program.process.returncode == 0 and "sent" in program.said, program.complained
                return False
    raise AssertionError("the program does not end")


def rule(address: str, port: int, endpoint: str) -> str:
    return f"{{to: '{address}', ports: [{port}], endpoint: {endpoint}}}"


def reaches_a_mixture(arena: Arena, transport: str, family: int, seconds: int) -> bool:
    """The port of one destination that is granted, at the address of another one."""
    at = FAMILIES[family]
    with datagrams(arena.host, at.client) as granted, datagrams(arena.host, at.client) as far:
        first, second = granted.getsockname()[1], far.getsockname()[1]
        rules = rule(at.client, first, "out"), rule(at.nobody, second, "out")
        policy = f"name: t\nendpoints: {{out: '{at.any}:dynamic'}}\negress: [{', '.join(rules)}]\ndefault: deny\n"
        words = (at.client, first, at.nobody, second, seconds, *SEGMENTS)
        with arena.mixing(transport, policy, *words) as program:
            return arrives(program, far)


def reaches_loopback(arena: Arena, seconds: int) -> bool:
    """The port of the only destination that is granted, on the host's loopback: the peer has just gone."""
    with datagrams(arena.host) as granted:
        port = granted.getsockname()[1]
        with arena.host.netns.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
            far.bind(("127.0.0.1", port))
            granted_rule = rule(CLIENT4, port, "out")
            policy = f"name: t\nendpoints: {{out: 0.0.0.0:dynamic}}\negress: [{granted_rule}]\ndefault: deny\n"
            words = (CLIENT4, port, "-", 0, seconds, *SEGMENTS[:-1], 600)
            with arena.mixing("born", policy, *words) as program:
                return arrives(program, far)


def has_others_source(arena: Arena, family: int, seconds: int) -> bool:
    """The source that the rule for another destination lends."""
    at = FAMILIES[family]
    give_another_address(arena.host)
    arena.host.netns.run("ip", "address", "replace", f"{OTHER6}/128", "dev", "lo")
    with datagrams(arena.host, at.client) as far:
        port = far.getsockname()[1]
        rules = (
            f"{{to: '{at.client}', ports: [{port}], endpoint: out}}, {{to: '{at.nobody}', ports: [9], endpoint: other}}"
        )
        endpoints = f"{{out: '{at.one}:dynamic', other: '{at.other}:dynamic'}}"
        policy = f"name: t\nendpoints: {endpoints}\negress: [{rules}]\ndefault: deny\n"
        words = (at.client, port, at.nobody, 9, seconds, *HOPS[family], "alone")
        with arena.mixing("born", policy, *words) as program:
            return arrives(program, far, at.one.strip("[]"))


@pytest.fixture
def arena(host: Host, programs: Programs, tmp_path: Path) -> Arena:
    return Arena(host, programs, tmp_path)


@pytest.fixture
def undefended(without: Without, programs: Programs, tmp_path: Path) -> Arena:
    return Arena(without("in the datagram"), programs, tmp_path)


def is_shown(attack: bool) -> None:
    """It depends on when two threads run."""
    if not attack:
        pytest.skip("the two threads have not met on this machine, this time")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_mixture_of_two_destinations_is_not_reached(arena: Arena, transport: str, family: int) -> None:
    assert not reaches_a_mixture(arena, transport, family, SHORT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_only_the_socket_is_looked_at_it_is(undefended: Arena, transport: str, family: int) -> None:
    is_shown(reaches_a_mixture(undefended, transport, family, LONG))


def test_the_hosts_loopback_is_not_reached_by_a_peer_that_goes(arena: Arena) -> None:
    assert not reaches_loopback(arena, SHORT)


def test_control_where_only_the_socket_is_looked_at_the_loopback_is(undefended: Arena) -> None:
    is_shown(reaches_loopback(undefended, LONG))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_datagram_has_no_source_of_another_destinations_rule(arena: Arena, family: int) -> None:
    assert not has_others_source(arena, family, SHORT)


@pytest.mark.parametrize("family", FAMILIES)
def test_control_where_only_the_socket_is_looked_at_it_has(undefended: Arena, family: int) -> None:
    is_shown(has_others_source(undefended, family, LONG))
