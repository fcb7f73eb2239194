"""Datagrams and options that no hook on a system call sees: control messages, socket options, other protocols."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Confined, Without
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

OTHER4 = "10.98.0.78"
"""An address of the host's that no endpoint names."""

GROUP4 = "239.1.2.3"

IP_RETOPTS, IP_PKTINFO, IPV6_PKTINFO, IPV6_RTHDR = 7, 8, 50, 57
INET, INET6, STREAM, DGRAM, RAW = 2, 10, 1, 2, 3
SCTP, UDPLITE, ICMP = 132, 136, 1

POLICY = """
name: t
endpoints: {{out: '{source}:dynamic', out6: '[::]:dynamic'}}
egress:
  - {{to: {to}, endpoint: out}}
  - {{to: '{to6}', endpoint: out6}}
default: deny
"""


def policy(source: str = "0.0.0.0", to: str = CLIENT4, to6: str = CLIENT6) -> str:
    return POLICY.format(source=source, to=to, to6=to6)


@contextmanager
def datagrams(host: Host, address: str = CLIENT4) -> Iterator[socket.socket]:
    """A UDP socket of the client."""
    with host.client.inside():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 0))
    with closing(sock):
        yield sock


def send_to_group(host: Host, port: int) -> None:
    """Send a datagram from the client to the multicast group."""
    with datagrams(host) as client:
        client.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(CLIENT4))
        client.sendto(b"stranger", (GROUP4, port))


def came(sock: socket.socket, within: float = 0.5) -> str | None:
    """The sender of the next datagram; None where none comes."""
    sock.settimeout(within * PATIENCE)
    try:
        return str(sock.recvfrom(100)[1][0])
    except TimeoutError:
        return None


def from_another_address(host: Host, confine: Confine, far: socket.socket) -> Confined:
    """A connected socket sends with IP_PKTINFO: from an address of the host's that is not its endpoint's."""
    host.netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    where = struct.pack("=i4s4s", 0, socket.inet_aton(OTHER4), bytes(4)).hex()
    steps = ["make", INET, DGRAM, 0, "connect", CLIENT4, far.getsockname()[1]]
    return confine(host, "direct", policy(HOST4), *steps, "cmsg", 0, IP_PKTINFO, where, "-", "-", "wait")


def test_a_datagram_leaves_from_its_sockets_own_address_only(host: Host, confine: Confine) -> None:
    with datagrams(host) as far:
        one = from_another_address(host, confine, far)
        assert one.lines(3)[1:] == ["connect ok", "cmsg ok"]
        assert came(far, 10) == HOST4


def test_control_without_the_defence_it_leaves_from_another(without: Without, confine: Confine) -> None:
    host = without("source")
    with datagrams(host) as far:
        one = from_another_address(host, confine, far)
        assert one.lines(3)[1:] == ["connect ok", "cmsg ok"]
        assert came(far, 10) == OTHER4


def test_a_connected_socket_may_still_send_with_a_control_message(host: Host, confine: Confine) -> None:
    where = struct.pack("=i4s4s", 0, bytes(4), bytes(4)).hex()
    with datagrams(host) as far:
        steps = ["make", INET, DGRAM, 0, "connect", CLIENT4, far.getsockname()[1]]
        one = confine(host, "direct", policy(HOST4), *steps, "cmsg", 0, IP_PKTINFO, where, "-", "-", "wait")
        assert one.lines(3)[1:] == ["connect ok", "cmsg ok"]
        assert came(far, 10) == HOST4


@pytest.mark.parametrize("source", ["0.0.0.0", HOST4])
@pytest.mark.parametrize("transport", ["born", "direct"])
def test_a_socket_with_a_peer_of_ipv6_sends_to_ipv4_too(
    host: Host, confine: Confine, transport: str, source: str
) -> None:
    """An IPv6 address that it has is 127.0.0.6 to the kernel, as a source of IPv4."""
    with datagrams(host) as far, datagrams(host, CLIENT6) as far6:
        steps = ["make", INET6, DGRAM, 0, "connect", CLIENT6, far6.getsockname()[1]]
        steps += ["send", f"::ffff:{CLIENT4}", far.getsockname()[1], "send", CLIENT6, far6.getsockname()[1], "wait"]
        one = confine(host, transport, policy(source), *steps)
        assert one.lines(4)[1:] == ["connect ok", "send ok", "send ok"]
        assert came(far, 10) == HOST4
        assert came(far6, 10) == HOST6


@pytest.mark.parametrize("transport", ["born", "direct"])
def test_a_socket_with_a_peer_of_ipv4_sends_to_no_other(host: Host, confine: Confine, transport: str) -> None:
    with datagrams(host) as far, datagrams(host) as other:
        ports = far.getsockname()[1], other.getsockname()[1]
        steps = ["make", INET6, DGRAM, 0, "connect", f"::ffff:{CLIENT4}", ports[0], "send", "::ffff:10.98.0.99", 9]
        one = confine(host, transport, policy(), *steps, "send", f"::ffff:{CLIENT4}", ports[1], "wait")
        assert one.lines(4)[1:] == ["connect ok", "send EACCES", "send ok"]
        assert came(other, 10) == HOST4


def send_to_unbound(host: Host, confine: Confine) -> Confined:
    """A refused datagram leaves a socket with a port of the host's; the client sends one to that port."""
    steps = ["make", INET, DGRAM, 0, "send", HOST4, 9, "name", "wait", "receive", "wait"]
    one = confine(host, "direct", policy(to="192.0.2.1"), *steps)
    lines = one.lines(3)
    assert lines[1] == "send EACCES"
    port = int(lines[2].split()[-1])
    assert port
    with datagrams(host) as client:
        client.sendto(b"in", (HOST4, port))
    one.resume()
    return one


def test_a_socket_without_an_endpoint_receives_nothing_from_a_client(host: Host, confine: Confine) -> None:
    one = send_to_unbound(host, confine)
    assert one.lines(4)[-1] == "receive none"


def test_control_without_the_packet_hook_it_receives_a_datagram(without: Without, confine: Confine) -> None:
    host = without("packets in")
    one = send_to_unbound(host, confine)
    assert one.lines(4)[-1] == "receive in"


def test_answers_of_granted_destinations_are_received(host: Host, confine: Confine) -> None:
    with datagrams(host) as far:
        steps = ["make", INET, DGRAM, 0, "send", CLIENT4, far.getsockname()[1], "wait", "receive", "wait"]
        one = confine(host, "direct", policy(), *steps)
        assert one.lines(2)[-1] == "send ok"
        far.settimeout(10 * PATIENCE)
        _, sender = far.recvfrom(100)
        far.sendto(b"answer", sender)
        one.resume()
        assert one.lines(3)[-1] == "receive answer"


def test_a_datagram_endpoint_receives_from_any_client(host: Host, confine: Confine) -> None:
    port = host.port()
    text = f"name: t\nendpoints: {{dns: 0.0.0.0:{port}}}\ningress: [{{bind: '*:53', endpoint: dns}}]\ndefault: deny\n"
    one = confine(host, "direct", text, "make", INET, DGRAM, 0, "bind", "0.0.0.0", 53, "wait", "receive", "wait")
    assert one.lines(2)[-1] == "bind ok"
    with datagrams(host) as client:
        client.sendto(b"question", (HOST4, port))
    one.resume()
    assert one.lines(3)[-1] == "receive question"


ROUTES = {
    "routing header": (41, IPV6_RTHDR, "00020201" + "00000000" + socket.inet_pton(INET6, CLIENT6).hex()),
    "sticky destination options": (41, 59, "0000010400000000"),
    "sticky source": (41, IPV6_PKTINFO, socket.inet_pton(INET6, "fd98::1").hex() + "00000000"),
    "old options": (41, 6, "00" * 8),
    "interface for multicast": (41, 17, "01000000"),
    "source route": (0, 4, "830b0401020304010203040100"),
    "repair": (6, 19, "01000000"),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ROUTES)
def test_options_that_reach_past_the_policy_are_refused(
    host: Host, confine: Confine, transport: str, name: str
) -> None:
    level, option, value = ROUTES[name]
    steps = ["make", INET6, STREAM, 0, "connect", CLIENT6, 9, "bytes", level, option, value, "wait"]
    one = confine(host, transport, policy(), *steps)
    lines = one.lines(3)
    assert lines[1] == "connect ECONNREFUSED"
    assert lines[2] in ("bytes EPERM", "bytes EACCES")


@contextmanager
def on_the_wire(host: Host) -> Iterator[Callable[[], bool]]:
    """Tells whether an IPv4 packet with options and a UDP header has reached the client."""
    with host.client.inside():
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    with closing(wire):

        def has_arrived() -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = wire.recv(200, socket.MSG_DONTWAIT)
                    if packet[0] > 0x45 and packet[9] == socket.IPPROTO_UDP:
                        return True
            return False

        yield has_arrived


def with_options(host: Host, confine: Confine) -> Confined:
    """A datagram with IP options in a control message. This option records the route, which any user may ask for; a
    source route takes the same path in kernels that allow it to users.
    """
    record_route = "07070400000000" + "00"
    steps = ["make", INET, DGRAM, 0, "cmsg", 0, IP_RETOPTS, record_route, CLIENT4, 9, "wait"]
    return confine(host, "direct", policy(), *steps)


def test_a_datagram_with_options_is_refused(host: Host, confine: Confine) -> None:
    with on_the_wire(host) as has_arrived:
        assert with_options(host, confine).lines(2)[-1] == "cmsg EPERM"
        assert not has_arrived()


def test_control_without_the_packet_hook_it_leaves_with_them(without: Without, confine: Confine) -> None:
    host = without("packets out")
    with on_the_wire(host) as has_arrived:
        assert with_options(host, confine).lines(2)[-1] == "cmsg ok"
        assert until("the packet", has_arrived)


PROTOCOLS = {"udp-lite": (DGRAM, UDPLITE), "icmp": (DGRAM, ICMP)}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_without_rules_is_refused(host: Host, confine: Confine, name: str) -> None:
    host.netns.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
    kind, protocol = PROTOCOLS[name]
    one = confine(host, "direct", policy(), "make", INET, kind, protocol, "wait")
    assert one.lines(1) == ["make EPERM"]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_control_without_the_defence_a_socket_of_it_is_made(without: Without, confine: Confine, name: str) -> None:
    host = without("protocols")
    host.netns.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
    kind, protocol = PROTOCOLS[name]
    one = confine(host, "direct", policy(), "make", INET, kind, protocol, "wait")
    assert one.lines(1) == ["make ok"]


def test_a_policy_can_allow_other_protocols(host: Host, confine: Confine) -> None:
    text = policy().replace("default: deny", "default: {bind: deny, connect: deny, other: container}")
    with datagrams(host) as far:
        port = far.getsockname()[1]
        one = confine(host, "direct", text, "make", INET, DGRAM, UDPLITE, "send", CLIENT4, port, "wait")
        assert one.lines(2) == ["make ok", "send ok"]


def test_one_rule_that_denies_is_enough_to_refuse_other_protocols(host: Host, confine: Confine) -> None:
    text = f"name: t\negress: [{{to: {CLIENT4}, action: deny}}]\n"
    one = confine(host, "direct", text, "make", INET, DGRAM, UDPLITE, "make", INET, STREAM, 0, "wait")
    assert one.lines(2) == ["make EPERM", "make ok"]


def to_no_address(host: Host, confine: Confine, transport: str, port: int, *steps: str | int) -> Confined:
    text = "name: t\nendpoints: {out: 0.0.0.0:dynamic, out6: '[::]:dynamic'}\negress:\n"
    if transport == "direct":
        text += "  - {to: 127.0.0.0/8, action: deny}\n  - {to: '::1', action: deny}\n"
    else:
        text += "  - {to: 0.0.0.0/0, endpoint: out}\n  - {to: '::/0', endpoint: out6}\n"
    return confine(host, transport, text, *steps, "wait")


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "::ffff:0.0.0.0"])
def test_the_unspecified_address_is_judged_as_loopback(host: Host, confine: Confine, address: str) -> None:
    with closing(host.netns.listener("::")) as listener:
        port = listener.getsockname()[1]
        family = INET6 if ":" in address else INET
        one = to_no_address(host, confine, "direct", port, "make", family, STREAM, 0, "connect", address, port)
        assert one.lines(2)[-1] == "connect EACCES"


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_control_without_the_defence_it_reaches_loopback(without: Without, confine: Confine, address: str) -> None:
    host = without("unspecified")
    with closing(host.netns.listener("::")) as listener:
        port = listener.getsockname()[1]
        family = INET6 if ":" in address else INET
        one = to_no_address(host, confine, "direct", port, "make", family, STREAM, 0, "connect", address, port)
        assert one.lines(2)[-1] == "connect ok"


def first_bytes(host: Host, confine: Confine, transport: str, address: str, port: int) -> list[str]:
    family = INET6 if ":" in address else INET
    steps = ["make", family, STREAM, 0, "cookieless", "fastopen", address, port, "wait"]
    return confine(host, transport, policy(), *steps).lines(3)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_connection_that_begins_with_data_is_judged_too(host: Host, confine: Confine, transport: str) -> None:
    with closing(host.netns.listener()) as listener:
        said = first_bytes(host, confine, transport, HOST4, listener.getsockname()[1])
        assert said[-1] in ("fastopen EACCES", "fastopen ENETUNREACH")
        listener.settimeout(0.3)
        with pytest.raises(TimeoutError):
            listener.accept()
