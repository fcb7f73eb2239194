"""What an eighth reading found in the hooks: each was possible, and is not any more."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.hostile.conftest import Confine, Confined, Without, for_transport
from tests.hostile.test_afterwards import OTHER4, apply
from tests.hostile.test_more_ways import give_another_address
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4

pytestmark = pytest.mark.e2e
INET, INET6, STREAM = 2, 10, 1
TCP_FASTOPEN_CONNECT = (6, 30)
NOTHING = "name: t\ndefault: deny\n"

# ---- a connection that was put off, and that the other end makes ----------------------------------------


def puts_off(host: Host, confine: Confine, transport: str, policy: str, far_port: int) -> tuple[Confined, int]:
    """A program that has only said that it wants to connect there, and the port that it has for it."""
    steps = ["make", INET, STREAM, 0, "cookieless", "option", *TCP_FASTOPEN_CONNECT, "connect", CLIENT4, far_port]
    one = confine(host, transport, policy, *steps, "name", "wait", "send", "-", "-", "send", "-", "-", "wait")
    return one, int(one.lines(5)[4].split()[-1])


def hears_after_connecting(host: Host, far_port: int, address: str, port: int) -> bytes:
    """What the other end gets that connects, from where the program is to connect to, to where that is."""
    with host.client.inside():
        far = socket.socket()
    with far:
        far.settimeout(2)
        far.bind((CLIENT4, far_port))
        try:
            far.connect((address, port))
            return far.recv(100)
        except OSError:
            return b""


def is_made_without_its_rule(host: Host, confine: Confine, tmp_path: Path, transport: str) -> bytes:
    far_port = host.port()
    text = f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\negress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
    one, port = puts_off(host, confine, transport, text, far_port)
    apply(host, one, tmp_path, for_transport(transport, NOTHING))
    one.resume()
    time.sleep(0.3)
    return hears_after_connecting(host, far_port, HOST4, port)


@pytest.mark.parametrize("transport", ["born", "direct", "swap"])
def test_a_connection_without_a_rule_is_not_made_by_the_other_end(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    assert is_made_without_its_rule(host, confine, tmp_path, transport) == b""


def test_control_without_the_packet_hook_the_other_end_makes_it(
    without: Without, confine: Confine, tmp_path: Path
) -> None:
    assert is_made_without_its_rule(without("packets in"), confine, tmp_path, "direct") == b"hello"


def test_nor_from_an_address_that_its_endpoint_does_not_have_any_more(host: Host, confine: Confine) -> None:
    give_another_address(host)
    name, far_port = host.endpoint(f"{OTHER4}:dynamic"), host.port()
    text = f"name: t\negress: [{{to: {CLIENT4}, endpoint: {name}}}]\ndefault: deny\n"
    one, port = puts_off(host, confine, "direct", text, far_port)
    host.graft("ep", "set", name, f"{HOST4}:dynamic")
    one.resume()
    time.sleep(0.3)
    assert hears_after_connecting(host, far_port, OTHER4, port) == b""


def test_an_ipv6_socket_is_not_connected_to_the_ipv4_address_of_before(host: Host, confine: Confine) -> None:
    """The kernel still treats it as IPv4, and so its destination, at a port which no rule grants there."""
    granted, other = host.port(), host.port()
    text = (
        f"name: t\nendpoints: {{o4: '0.0.0.0:dynamic', o6: '[::]:dynamic'}}\n"
        f"egress: [{{to: {CLIENT4}, ports: [{granted}], endpoint: o4}}, {{to: '{CLIENT6}', endpoint: o6}}]\ndefault: deny\n"
    )
    steps = ["make", INET6, STREAM, 0, "connect", f"::ffff:{CLIENT4}", granted, "unspec", "cookieless"]
    confine(host, "direct", text, *steps, "fastopen", CLIENT6, other, "wait")
    port = 0
    for _ in range(20):
        time.sleep(0.1)
        found = host.netns.run("ss", "-Htn", "state", "syn-sent", f"dport = :{other}").split()
        if found:
            port = int(found[2].rsplit(":", 1)[1])
            break
    assert port
    assert hears_after_connecting(host, other, HOST4, port) == b""
