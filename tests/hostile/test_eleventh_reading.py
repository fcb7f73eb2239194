"""Sources of datagrams: on the host's loopback, of an interface that a program chose, lent without a tag."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Without, lines_of
from tests.hostile.test_datagrams import came, datagrams
from tests.support.building import Programs
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.shell import AS_NOBODY, Word
from tests.support.udp import udp

pytestmark = pytest.mark.e2e

INET, INET6, DGRAM = 2, 10, 2
SOL_IP, SOL_UDP, SOL_IPV6 = 0, 17, 41
ON, OFF, AS_INET = "01000000", "00000000", "02000000"
CORK, ADDRFORM = (SOL_UDP, 1), (SOL_IPV6, 1)
LOOPBACK = {INET: "127.0.0.1", INET6: "::1"}
NEAR, FAR = {INET: HOST4, INET6: HOST6}, {INET: CLIENT4, INET6: CLIENT6}


def granting(*to: str) -> str:
    """A policy that grants these destinations, from whatever address the kernel picks."""
    rules = ", ".join(f"{{to: '{one}', endpoint: out{6 if ':' in one else 4}}}" for one in to)
    return f"name: t\nendpoints: {{out4: '0.0.0.0:dynamic', out6: '[::]:dynamic'}}\negress: [{rules}]\ndefault: deny\n"


@contextmanager
def service(host: Host, address: str = HOST4) -> Iterator[socket.socket]:
    """A datagram service of the host's at its outward address. It may trust clients on loopback."""
    with closing(udp(host.netns, address)) as sock:
        yield sock


def senders(sock: socket.socket) -> set[str]:
    """Who has sent."""
    found = set()
    while sender := came(sock):
        found.add(sender)
    return found


# ---- a source on the host's loopback --------------------------------------------------------------------------


def clients_of_an_earlier_ipv6_socket(host: Host, confine: Confine, transport: str) -> set[str]:
    """Connected over IPv6 it has 127.0.0.6 (LOOPBACK4_IPV6) for IPv4, and IPV6_ADDRFORM, which is refused by now but to
    32-bit callers, makes that its only address.
    """
    with service(host) as trusting:
        port = trusting.getsockname()[1]
        steps: list[Word] = ["make", INET6, DGRAM, 0, "connect", CLIENT6, 9, "connect", f"::ffff:{HOST4}", port]
        steps += ["bytes32", *ADDRFORM, AS_INET, "bytes", *CORK, ON, "send", HOST4, port, "bytes", *CORK, OFF]
        steps += ["send", "-", "-", "wait"]
        lines = confine(host, transport, granting(CLIENT6, HOST4), *steps).lines(8)
        assert lines[:4] == ["make ok", "connect ok", "connect ok", "bytes32 ok"]
        return senders(trusting)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_socket_that_was_ipv6_is_no_client_on_loopback(host: Host, confine: Confine, transport: str) -> None:
    assert clients_of_an_earlier_ipv6_socket(host, confine, transport) == set()


def test_what_the_calls_let_pass_the_packet_hook_drops(without: Without, confine: Confine) -> None:
    host = without("loopback source at calls")
    assert clients_of_an_earlier_ipv6_socket(host, confine, "born") == set()


def test_control_where_nobody_compares_it_with_its_destination_it_is_one(without: Without, confine: Confine) -> None:
    assert clients_of_an_earlier_ipv6_socket(without("loopback source"), confine, "born") == {"127.0.0.6"}


def clients_that_were_on_loopback(
    host: Host, confine: Confine, transport: str, family: int, how: str, *between: str
) -> tuple[str, set[str]]:
    """What becomes of a send, or a connect, of a socket that is connected to loopback; and whom a service then sees."""
    with service(host, NEAR[family]) as trusting:
        port = trusting.getsockname()[1]
        text = granting(LOOPBACK[family], NEAR[family])
        steps = ["make", family, DGRAM, 0, "connect", LOOPBACK[family], 9, *between, how, NEAR[family], port]
        lines = confine(host, transport, text, *steps, "send", "-", "-", "wait").lines(4 + len(between))
        return lines[2 + len(between)], senders(trusting)


FAMILIES = pytest.mark.parametrize("family", [INET, INET6])
HOW = pytest.mark.parametrize("how", ["send", "connect"])


@FAMILIES
@HOW
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_address_for_loopback_is_for_loopback(
    host: Host, confine: Confine, transport: str, how: str, family: int
) -> None:
    assert clients_that_were_on_loopback(host, confine, transport, family, how) == (f"{how} EACCES", set())


@FAMILIES
@HOW
def test_control_where_nobody_compares_them_it_is_for_all(
    without: Without, confine: Confine, how: str, family: int
) -> None:
    seen = clients_that_were_on_loopback(without("loopback source"), confine, "born", family, how)
    assert seen == (f"{how} ok", {LOOPBACK[family]})


@FAMILIES
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_disconnected_in_between_it_gets_another_address(
    host: Host, confine: Confine, transport: str, family: int
) -> None:
    """As getaddrinfo does, which connects one socket to one address after the other."""
    seen = clients_that_were_on_loopback(host, confine, transport, family, "connect", "unspec")
    assert seen == ("connect ok", {NEAR[family]})


@pytest.mark.parametrize("between", [(), ("unspec",)])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_socket_of_both_families_reaches_one_after_the_other(
    host: Host, confine: Confine, transport: str, between: tuple[str, ...]
) -> None:
    with service(host) as plain:
        to = (f"::ffff:{HOST4}", plain.getsockname()[1])
        steps = ["make", INET6, DGRAM, 0, "connect", CLIENT6, 9, *between, "connect", *to, "send", "-", "-"]
        steps += ["send", CLIENT6, 9, "send", *to, "wait"]
        lines = confine(host, transport, granting(CLIENT6, HOST4), *steps).lines(6 + len(between))
        assert {line.split()[1] for line in lines} == {"ok"}
        assert senders(plain) == {HOST4}


# ---- the address of an interface that the program chose -------------------------------------------------------

CHOSEN4, CHOSEN6, GROUP6 = "10.77.0.1", "fd77::1", "ff15::99"


@contextmanager
def another_link(host: Host) -> Iterator[int]:
    """Its number. The host has an address there, and a worse route to the client."""
    run = host.netns.run
    run("ip", "link", "add", "chosen0", "type", "veth", "peer", "name", "chosen1")
    try:
        run("ip", "link", "set", "chosen1", "up")
        run("ip", "link", "set", "chosen0", "up")
        run("ip", "address", "add", f"{CHOSEN4}/24", "dev", "chosen0")
        run("ip", "address", "add", f"{CHOSEN6}/64", "dev", "chosen0", "nodad")
        run("ip", "route", "add", "fd98::/64", "dev", "chosen0", "src", CHOSEN6, "metric", "4096")
        host.client.run("ip", "route", "replace", f"{CHOSEN4}/32", "via", HOST4)
        host.client.run("ip", "route", "replace", f"{CHOSEN6}/128", "via", HOST6)
        yield int(run("ip", "-o", "link", "show", "chosen0").split(":")[0])
    finally:
        run("ip", "link", "delete", "chosen0")


def number(index: int, order: str = "=") -> str:
    return struct.pack(f"{order}i", index).hex()


def leaves_from(host: Host, confine: Confine, transport: str, family: int, text: str, *calls: Word) -> str | None:
    """The source of a datagram to the client, after these calls on its socket."""
    with datagrams(host, FAR[family]) as far:
        to = (FAR[family], far.getsockname()[1])
        steps = ["make", family, DGRAM, 0, *calls, "connect", *to, "send", *to, "wait"]
        one = confine(host, transport, text, *steps)
        one.program.until("the send", lambda: "\nsend " in one.program.said)
        return came(far)


def by_a_group(host: Host, confine: Confine, transport: str) -> str | None:
    """IPV6_MULTICAST_IF is permitted where a rule names a group; a connect to that takes the interface's address."""
    with another_link(host) as index:
        calls: list[Word] = ["bytes", SOL_IPV6, 17, number(index), "connect", GROUP6, 9]
        return leaves_from(host, confine, transport, INET6, granting(GROUP6, CLIENT6), *calls)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_program_does_not_choose_its_address_by_an_ipv6_groups_interface(
    host: Host, confine: Confine, transport: str
) -> None:
    assert by_a_group(host, confine, transport) == HOST6


def test_control_where_a_connect_to_a_group_is_not_refused_it_does(without: Without, confine: Confine) -> None:
    assert by_a_group(without("chosen address"), confine, "born") == CHOSEN6


def by_an_interface(host: Host, confine: Confine, transport: str, family: int, way: str) -> str | None:
    """The option is set by 32-bit calls, which no hook sees, and only while the socket is connected."""
    with another_link(host) as index:
        option, on, off = {
            "IP_UNICAST_IF": ((SOL_IP, 50), number(index, ">"), number(0)),
            "IPV6_UNICAST_IF": ((SOL_IPV6, 76), number(index, ">"), number(0)),
            "IPV6_PKTINFO": ((SOL_IPV6, 50), "00" * 16 + number(index), "00" * 20),
        }[way]
        calls: list[Word] = ["bytes32", *option, on, "connect", FAR[family], 9, "bytes32", *option, off]
        return leaves_from(host, confine, transport, family, granting(FAR[family]), *calls)


WAYS = pytest.mark.parametrize(
    ("family", "way"), [(INET, "IP_UNICAST_IF"), (INET6, "IPV6_UNICAST_IF"), (INET6, "IPV6_PKTINFO")]
)


@WAYS
@pytest.mark.parametrize("transport", ["born", "direct"])
def test_nor_by_the_interface_that_its_datagrams_leave_by(
    host: Host, confine: Confine, transport: str, family: int, way: str
) -> None:
    assert by_an_interface(host, confine, transport, family, way) == NEAR[family]


@WAYS
def test_control_where_nobody_looks_at_that_it_does(without: Without, confine: Confine, family: int, way: str) -> None:
    chosen = CHOSEN4 if family == INET else CHOSEN6
    assert by_an_interface(without("chosen address"), confine, "born", family, way) == chosen


# ---- what an endpoint lent a socket without a tag -------------------------------------------------------------

LENDING = "name: t\nendpoints: {{lends: '{at}'}}\negress: [{{to: 10.98.0.9, endpoint: lends}}]\n"
OTHER = (
    f"name: t\nendpoints: {{other: '0.0.0.0:dynamic'}}\negress: [{{to: {CLIENT4}, endpoint: other}}]\ndefault: deny\n"
)


def keeps_what_was_lent(host: Host, programs: Programs, folder: Path, without_tag: str) -> tuple[str | None, str]:
    """What a socket sends from, and hears, that had an endpoint's address and port, when that is gone.

    It was made before there was a policy, under one that denied nothing, or has the tag of an earlier container.
    """
    port = host.port()
    first, second = folder / "first.yaml", folder / "second.yaml"
    default = "" if without_tag == "denied nothing" else "default: deny\n"
    first.write_text(LENDING.format(at=f"{HOST4}:{port}") + default)
    second.write_text(OTHER)
    with datagrams(host) as far, new_cgroup("lent") as path:
        steps: list[Word] = (
            ["make", INET, DGRAM, 0, "wait"] if without_tag == "premade" else ["wait", "make", INET, DGRAM, 0]
        )
        steps += ["connect", "10.98.0.9", 9, "unspec", "name"]
        steps += ["hide", "wait", "unhide"] if without_tag == "earlier" else ["wait"]
        steps += [
            "connect",
            CLIENT4,
            far.getsockname()[1],
            "unspec",
            "send",
            CLIENT4,
            far.getsockname()[1],
            "receive",
            "wait",
        ]
        command = [*in_cgroup(path), *host.netns.command(*AS_NOBODY, programs["calls"], *steps)]
        program = host.start_command(command, talk=True)
        try:
            program.until("in its cgroup", lambda: (path / "cgroup.procs").read_text())
            if without_tag == "premade":
                lines_of(program, 1)
            host.graft("attach", "--cgroup", path, "--policy", first)
            program.tell("\n")
            assert lines_of(program, 4)[3] == f"name {HOST4} {port}"
            if without_tag == "earlier":
                lines_of(program, 5)
                host.remove_at(path)
                host.graft("attach", "--cgroup", path, "--policy", second)
            else:
                host.graft("policy", "apply", "--cgroup", path, second)
            program.tell("\n")
            sender = came(far, 2)
            far.sendto(b"stranger", (HOST4, port))
            program.until("an end", lambda: "receive" in program.said)
            return sender, program.said.splitlines()[-1]
        finally:
            host.remove_at(path)
            program.stop()


WITHOUT_TAG = pytest.mark.parametrize("without_tag", ["premade", "denied nothing", "earlier"])


@WITHOUT_TAG
def test_a_socket_without_a_tag_does_not_keep_what_was_lent(
    host: Host, programs: Programs, tmp_path: Path, without_tag: str
) -> None:
    assert keeps_what_was_lent(host, programs, tmp_path, without_tag) == (None, "receive none")


@WITHOUT_TAG
def test_control_where_it_gets_none_it_does(
    without: Without, programs: Programs, tmp_path: Path, without_tag: str
) -> None:
    host = without("lent without a tag")
    assert keeps_what_was_lent(host, programs, tmp_path, without_tag) == (HOST4, "receive stranger")
