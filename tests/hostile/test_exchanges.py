"""Datagrams in transport splice: who may take what graftd relays, over IPv4 and by its ports at ::1."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable

import pytest

from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST6
from tests.support.plain import plain

pytestmark = pytest.mark.e2e

Without = Callable[[str], Host]
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")
THIEF = """
import socket, sys
import select
family, address = (socket.AF_INET6, "::1") if sys.argv[1] == "6" else (socket.AF_INET, "0.0.0.0")
thieves = [socket.socket(family, socket.SOCK_DGRAM) for _ in sys.argv[2:]]
for thief, port in zip(thieves, sys.argv[2:]):
    thief.bind((address, int(port)))
print("ready", flush=True); print("stole", select.select(thieves, [], [])[0][0].recv(100), flush=True)
"""
FAMILIES = pytest.mark.parametrize("address", [CLIENT4, CLIENT6])


def ports(host: Host, six: bool) -> list[int]:
    """At which graftd receives for the container."""
    if six:
        ((_, offer),) = host.maps.offers.items()
        return list(offer.ports[: offer.count])
    return [value.datagram_port for _, value in host.maps.relays.items()]


def is_robbed(host: Host, address: str, connects: bool) -> bool:
    """Whether a program that took the port of a graftd which was killed gets a container's granted datagrams."""
    six = ":" in address
    with plain(host) as container, container.udp(socket.AF_INET6 if six else socket.AF_INET) as victim:
        if six:  # else it is connected over IPv4
            victim.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        container.attach("-e", f"{address}={host.endpoint(f'[{HOST6}]:dynamic' if six else '0.0.0.0:dynamic')}")
        host.kill_daemon()
        thief = container.start(*NOBODY, sys.executable, "-c", THIEF, 6 if six else 4, *ports(host, six))
        thief.says("ready")
        try:
            if connects:
                victim.connect((address, 9))
                victim.send(b"secret")
            else:
                victim.sendto(b"secret", (address, 9))
        except ConnectionRefusedError:
            return False
        thief.says("stole b'secret'")
        return True


@FAMILIES
@pytest.mark.parametrize("connects", [False, True])
def test_nobody_who_takes_the_relays_port_gets_a_containers_datagrams(host: Host, address: str, connects: bool) -> None:
    assert not is_robbed(host, address, connects)


@FAMILIES
@pytest.mark.parametrize("connects", [False, True])
def test_control_where_the_hook_does_not_look_who_receives_he_does(
    without: Without, address: str, connects: bool
) -> None:
    assert is_robbed(without("relay's mark for datagrams"), address, connects)
