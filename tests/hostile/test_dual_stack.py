"""An IPv6 endpoint grants the IPv6 port, and not the IPv4 port of the same number with it."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Confined, Without
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4, HOST6
from tests.support.udp import udp

pytestmark = pytest.mark.e2e


def bind_both(host: Host, confine: Confine, transport: str, dual: bool = False) -> tuple[Confined, int]:
    """A dual-stack socket binds [::]:80 on an IPv6 endpoint."""
    port = host.port()
    endpoint = f"{{address: '[::]:{port}', dual_stack: {str(dual).lower()}}}"
    text = f"name: t\nendpoints: {{six: {endpoint}}}\ningress: [{{bind: '*:80', endpoint: six}}]\ndefault: deny\n"
    # IPV6_V6ONLY is 0 unless the machine says otherwise.
    steps = ["make", 10, 1, 0, "bytes", 41, 26, "00000000", "bind", "::", 80, "listen", "wait"]
    return confine(host, transport, text, *steps), port


def test_in_swap_it_serves_ipv6_only(host: Host, confine: Confine) -> None:
    one, port = bind_both(host, confine, "swap")
    assert one.lines(4)[2:] == ["bind ok", "listen ok"]
    assert host.client.reaches(HOST6, port)
    assert not host.client.reaches(HOST4, port)
    host.netns.listener(HOST4, port).close()  # it is free for another program


def test_in_direct_it_is_refused(host: Host, confine: Confine) -> None:
    one, port = bind_both(host, confine, "direct")
    assert one.lines(4)[2] == "bind EACCES"
    host.netns.listener(HOST4, port).close()


def test_in_direct_a_socket_that_takes_no_ipv4_is_served(host: Host, confine: Confine) -> None:
    port = host.port()
    text = f"name: t\nendpoints: {{six: '[::]:{port}'}}\ningress: [{{bind: '*:80', endpoint: six}}]\ndefault: deny\n"
    steps = ["make", 10, 1, 0, "option", 41, 26, "bind", "::", 80, "listen", "wait"]
    assert confine(host, "direct", text, *steps).lines(4)[2:] == ["bind ok", "listen ok"]
    assert host.client.reaches(HOST6, port)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_endpoint_that_says_so_serves_both(host: Host, confine: Confine, transport: str) -> None:
    one, port = bind_both(host, confine, transport, dual=True)
    assert one.lines(4)[2:] == ["bind ok", "listen ok"]
    assert host.client.reaches(HOST6, port) and host.client.reaches(HOST4, port)


def datagram_server_sends(
    host: Host, confine: Confine, transport: str, dual: bool, to: tuple[str, int], granted: str = CLIENT4
) -> str:
    """What a send of a datagram server at an IPv6 endpoint returns, where a rule grants IPv4 destinations."""
    endpoint = f"{{address: '[::]:{host.port()}', dual_stack: {str(dual).lower()}}}"
    text = (
        f"name: t\nendpoints: {{six: {endpoint}, out: '0.0.0.0:dynamic'}}\n"
        f"ingress: [{{bind: '*:53', endpoint: six}}]\negress: [{{to: {granted}, endpoint: out}}]\ndefault: deny\n"
    )
    steps = ["make", 10, 2, 0, "bytes", 41, 26, "00000000"]
    steps += ["bind", "::", 53, "send", *to, "wait"]
    return confine(host, transport, text, *steps).lines(4)[3]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_datagram_server_at_one_that_says_so_answers_ipv4_clients_from_its_port(
    host: Host, confine: Confine, transport: str
) -> None:
    with closing(udp(host.client, CLIENT4)) as client:
        assert datagram_server_sends(host, confine, transport, True, client.getsockname()) == "send ok"
        _, peer = client.recvfrom(100)
        assert peer[0] == HOST4
        listed = host.netns.run("ss", "-Huan", f"sport = :{peer[1]}")
        assert f"*:{peer[1]}" in listed or f"[::]:{peer[1]}" in listed


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_it_sends_nowhere_else(host: Host, confine: Confine, transport: str) -> None:
    with closing(udp(host.client, CLIENT4)) as client:
        said = datagram_server_sends(host, confine, transport, True, client.getsockname(), "192.0.2.1")
        assert said in ("send EACCES", "send EPERM")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nor_when_the_endpoint_does_not_say_so_any_more(host: Host, confine: Confine, transport: str) -> None:
    """Its socket can send to IPv4 still, and is at the endpoint's address and port."""
    port = host.port()
    name = host.endpoint(f"[::]:{port}", dual_stack=True)
    text = (
        f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\ningress: [{{bind: '*:53', endpoint: {name}}}]\n"
        f"egress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
    )
    with closing(udp(host.client, CLIENT4)) as client:
        to = client.getsockname()
        steps = ["make", 10, 2, 0, "bytes", 41, 26, "00000000", "bind", "::", 53, "send", *to, "wait", "send", *to]
        one = confine(host, transport, text, *steps, "wait")
        assert one.lines(4)[3] == "send ok"
        host.graft("ep", "set", name, f"[::]:{port}")
        one.resume()
        assert one.lines(5)[4] in ("send EACCES", "send EPERM")


def test_one_at_an_ipv6_endpoint_does_not(host: Host, confine: Confine) -> None:
    with closing(udp(host.client, CLIENT4)) as client:
        assert datagram_server_sends(host, confine, "swap", False, client.getsockname()) != "send ok"


def test_control_without_the_hook_it_takes_both_ports(without: Without, confine: Confine) -> None:
    host = without("ipv4")
    one, port = bind_both(host, confine, "direct")
    assert one.lines(4)[2:] == ["bind ok", "listen ok"]
    assert host.client.reaches(HOST4, port)
