"""An endpoint that is made one of another protocol is lost for the sockets that had it, connected ones too."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Without
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4

pytestmark = pytest.mark.e2e

NAME = "lent13"
POLICY = f"name: t\negress: [{{to: {CLIENT4}, endpoint: {NAME}}}]\ndefault: deny\n"
SEND = ("send", "-", "-")


def goes_on(host: Host, confine: Confine, transport: str) -> bool:
    """Whether a connected UDP socket still sends, when its endpoint is for TCP only."""
    host.graft("ep", "add", NAME, "0.0.0.0:dynamic")
    with host.client.inside():
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(peer):
        peer.bind((CLIENT4, 0))
        to = (CLIENT4, peer.getsockname()[1])
        one = confine(host, transport, POLICY, "make", 2, 2, 0, "connect", *to, *SEND, "wait", *SEND, "wait")
        one.lines(3)
        peer.settimeout(10)
        peer.recv(100)
        host.graft("ep", "set", NAME, "0.0.0.0:dynamic", "--proto", "tcp")
        one.resume()
        one.lines(4)
        peer.settimeout(1)
        try:
            return bool(peer.recv(100))
        except TimeoutError:
            return False


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_connected_socket_does_not_go_on_from_an_endpoint_of_another_protocol(
    host: Host, confine: Confine, transport: str
) -> None:
    assert not goes_on(host, confine, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_its_packets_are_not_judged_by_it_it_does(
    without: Without, confine: Confine, transport: str
) -> None:
    assert goes_on(without("exchange's protocol"), confine, transport)
