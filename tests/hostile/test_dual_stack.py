"""An IPv6 endpoint grants the IPv6 port, and not the IPv4 port of the same number with it."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Confined, Without
from tests.support.installation import Host
from tests.support.namespaces import HOST4, HOST6

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


def test_control_without_the_hook_it_takes_both_ports(without: Without, confine: Confine) -> None:
    host = without("ipv4")
    one, port = bind_both(host, confine, "direct")
    assert one.lines(4)[2:] == ["bind ok", "listen ok"]
    assert host.client.reaches(HOST4, port)
