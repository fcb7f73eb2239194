"""Sources and ports of datagrams: one that an option chooses, loopback's, a port that was lent for somebody else."""

from __future__ import annotations

import socket
import struct

import pytest

from tests.hostile.conftest import Confine, Without
from tests.hostile.test_afterwards import OTHER4
from tests.hostile.test_datagrams import came, datagrams
from tests.hostile.test_eighth_reading import serving, source4
from tests.hostile.test_more_ways import give_another_address
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4

pytestmark = pytest.mark.e2e

INET, INET6, DGRAM = 2, 10, 2
GROUP = "224.0.0.99"
NOBODYS4 = "10.98.0.123"


# ---- IP_MULTICAST_IF, by a 32-bit call, with an address of the host's -----------------------------------------


def interface_of(host: Host) -> int:
    """The number of the host's interface towards the client."""
    lines = host.netns.run("ip", "-o", "-4", "address").splitlines()
    return next(int(line.split(":")[0]) for line in lines if f" {HOST4}/" in line)


def leaves_from(host: Host, confine: Confine, transport: str, family: int, bound: bool) -> str | None:
    """The source of a datagram to the client, after a connect to a group for which the program chose an address."""
    give_another_address(host)
    host.netns.run("ip", "route", "replace", "224.0.0.0/4", "via", CLIENT4)
    port = host.port()
    text = serving(port, "0.0.0.0", CLIENT4, GROUP)
    mapped = "::ffff:" if family == INET6 else ""
    with datagrams(host) as far:
        chosen = (bytes(4) + socket.inet_aton(OTHER4) + struct.pack("=i", interface_of(host))).hex()
        steps = ["make", family, DGRAM, 0, *(["bind", f"{mapped}0.0.0.0", 53] if bound else [])]
        steps += ["bytes32", 0, 32, chosen, "connect", f"{mapped}{GROUP}", 9]
        steps += ["send", f"{mapped}{CLIENT4}", far.getsockname()[1], "wait"]
        confine(host, transport, text, *steps).lines(5 if bound else 4)
        return came(far)


@pytest.mark.parametrize("family", [INET, INET6])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("transport", ["born", "direct"])
def test_a_program_does_not_choose_its_address_by_a_groups_interface(
    host: Host, confine: Confine, transport: str, bound: bool, family: int
) -> None:
    assert leaves_from(host, confine, transport, family, bound) == HOST4


def test_control_where_a_connect_to_a_group_is_not_refused_it_does(without: Without, confine: Confine) -> None:
    assert leaves_from(without("chosen address"), confine, "born", INET, False) == OTHER4


# ---- addresses of the loopback --------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["born", "direct"])
def test_a_server_at_all_addresses_has_those_of_the_loopback_without_being_asked_there(
    host: Host, confine: Confine, transport: str
) -> None:
    """None of them is noted: whoever sends to very many of them would push out what is. (EINVAL is the kernel's.)"""
    with datagrams(host) as far:
        steps = ["make", INET, DGRAM, 0, "bind", "0.0.0.0", 53]
        for address in ("127.0.0.1", "127.4.5.6", NOBODYS4):
            steps += ["cmsg", 0, 8, source4(address), CLIENT4, far.getsockname()[1]]
        one = confine(host, transport, serving(host.port(), "0.0.0.0", CLIENT4), *steps, "wait")
        assert one.lines(5)[2:] == ["cmsg EINVAL", "cmsg EINVAL", "cmsg EACCES"]


# ---- a port that an endpoint lends for one destination --------------------------------------------------------


def hears_strangers(host: Host, confine: Confine, transport: str) -> bool:
    """Whether a socket receives at a port that it was lent for another remote end than the one that sends."""
    port = host.port()
    text = (
        f"name: t\nendpoints: {{lends: '{HOST4}:{port}', other: '0.0.0.0:dynamic'}}\n"
        f"egress: [{{to: {CLIENT4}, ports: [9], endpoint: lends}}, {{to: 0.0.0.0/0, endpoint: other}}]\ndefault: deny\n"
    )
    with datagrams(host) as far:
        steps = ["make", INET, DGRAM, 0, "connect", CLIENT4, 9, "unspec", "wait", "receive", "wait"]
        one = confine(host, transport, text, *steps)
        one.lines(3)
        far.sendto(b"stranger", (HOST4, port))
        one.resume()
        return one.lines(4)[-1] == "receive stranger"


@pytest.mark.parametrize("transport", ["born", "direct"])
def test_a_port_that_was_lent_for_one_destination_hears_no_other(host: Host, confine: Confine, transport: str) -> None:
    assert not hears_strangers(host, confine, transport)


def test_control_where_nobody_looks_who_it_was_lent_for_it_does(without: Without, confine: Confine) -> None:
    assert hears_strangers(without("lost source"), confine, "born")


@pytest.mark.parametrize("transport", ["born", "direct"])
def test_it_hears_the_destination_that_it_was_lent_for(host: Host, confine: Confine, transport: str) -> None:
    port = host.port()
    rule = f"{{to: {CLIENT4}, endpoint: lends}}"
    text = f"name: t\nendpoints: {{lends: '{HOST4}:{port}'}}\negress: [{rule}]\ndefault: deny\n"
    with datagrams(host) as far:
        steps = ["make", INET, DGRAM, 0, "connect", CLIENT4, far.getsockname()[1], "wait", "receive", "wait"]
        one = confine(host, transport, text, *steps)
        one.lines(2)
        far.sendto(b"answer", (HOST4, port))
        one.resume()
        assert one.lines(3)[-1] == "receive answer"
