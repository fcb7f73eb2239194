"""Ways past a policy by a source, a port, a group, an endpoint elsewhere; and honest programs that no hook may stop."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine
from tests.hostile.test_afterwards import OTHER4, SOL_IP, SOL_SOCKET, SOL_TCP, apply
from tests.hostile.test_datagrams import GROUP4, came, datagrams, send_to_group
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e

SO_REUSEADDR = 2
SERVICE4 = "10.99.0.1"
"""An address that nobody has: the host's NAT leads it to the client's machine."""


def source_of_next(far: socket.socket, seconds: float = 10) -> tuple[str, int] | None:
    """Where the next connection comes from; None where none comes."""
    far.settimeout(seconds * PATIENCE)
    with contextlib.suppress(TimeoutError):
        near, peer = far.accept()
        near.close()
        return peer[0], peer[1]
    return None


# ---- a source address that stays when its endpoint is gone -------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_connection_leaves_from_the_address_of_an_endpoint_that_is_gone(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    host.netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    host.client.run("ip", "route", "replace", f"{OTHER4}/32", "via", HOST4)
    rules = f"egress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
    ends = f"name: t\nendpoints: {{web: '{OTHER4}:dynamic', out: '0.0.0.0:dynamic'}}\n"
    with contextlib.closing(host.client.listener()) as far:
        steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 80, "listen", "unspec", "wait"]
        one = confine(
            host,
            transport,
            f"{ends}ingress: [{{bind: '*:80', endpoint: web}}]\n{rules}",
            *steps,
            "connect",
            CLIENT4,
            far.getsockname()[1],
            "wait",
        )
        assert one.lines(4)[-1] == "unspec ok"
        apply(host, one, tmp_path, f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\n{rules}")
        one.resume()
        if one.lines(5)[-1] == "connect ok":
            assert source_of_next(far)[0] == HOST4  # type: ignore[index]


def test_no_datagram_leaves_from_the_address_of_an_endpoint_that_is_gone(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    host.netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    rules = f"egress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
    ends = f"name: t\nendpoints: {{dns: '{OTHER4}:dynamic', out: '0.0.0.0:dynamic'}}\n"
    with datagrams(host) as far:
        steps = [
            "make",
            2,
            2,
            0,
            "bind",
            "0.0.0.0",
            53,
            "unspec",
            "wait",
            "send",
            CLIENT4,
            far.getsockname()[1],
            "wait",
        ]
        one = confine(host, "direct", f"{ends}ingress: [{{bind: '*:53', endpoint: dns}}]\n{rules}", *steps)
        assert one.lines(3)[-1] == "unspec ok"
        apply(host, one, tmp_path, f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\n{rules}")
        one.resume()
        said = one.lines(4)[-1]
        assert came(far, 2) in (None, HOST4), said


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_endpoint_that_moved_is_no_source_at_its_old_address(host: Host, confine: Confine, transport: str) -> None:
    host.netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    host.client.run("ip", "route", "replace", f"{OTHER4}/32", "via", HOST4)
    name = host.endpoint(f"{OTHER4}:dynamic")
    text = f"name: t\negress: [{{to: {CLIENT4}, endpoint: {name}}}]\ndefault: deny\n"
    with contextlib.closing(host.client.listener()) as far:
        port = far.getsockname()[1]
        steps = ["make", 2, 1, 0, "connect", CLIENT4, port, "unspec", "wait", "connect", CLIENT4, port, "wait"]
        one = confine(host, transport, text, *steps)
        assert one.lines(3)[1:] == ["connect ok", "unspec ok"]
        assert source_of_next(far)[0] == OTHER4  # type: ignore[index]
        host.graft("ep", "set", name, "0.0.0.0:dynamic")
        one.resume()
        if one.lines(4)[-1] == "connect ok":
            assert source_of_next(far)[0] == HOST4  # type: ignore[index]


# ---- a datagram socket whose endpoint is gone, with a wide egress rule ----------------------------------------------


def bound_datagrams(port: int, granted: bool) -> str:
    ingress = "ingress: [{bind: '*:53', endpoint: dns}]\n" if granted else ""
    return (
        f"name: t\nendpoints: {{dns: '0.0.0.0:{port}', out: '0.0.0.0:dynamic'}}\n{ingress}"
        f"egress: [{{to: 0.0.0.0/0, endpoint: out}}]\ndefault: deny\n"
    )


def test_a_datagram_socket_hears_nobody_at_an_endpoint_that_is_gone(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    port = host.port()
    steps = ["make", 2, 2, 0, "bind", "0.0.0.0", 53, "wait", "receive", "wait"]
    one = confine(host, "direct", bound_datagrams(port, granted=True), *steps)
    assert one.lines(2)[-1] == "bind ok"
    apply(host, one, tmp_path, bound_datagrams(port, granted=False))
    with datagrams(host) as client:
        client.sendto(b"stranger", (HOST4, port))
    one.resume()
    assert one.lines(3)[-1] == "receive none"


def test_a_connected_datagram_socket_sends_no_more_from_an_endpoint_that_is_gone(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    port = host.port()
    with datagrams(host) as far:
        steps = ["make", 2, 2, 0, "bind", "0.0.0.0", 53, "connect", CLIENT4, far.getsockname()[1], "wait"]
        one = confine(host, "direct", bound_datagrams(port, granted=True), *steps, "send", "-", "-", "wait")
        assert one.lines(3)[-1] == "connect ok"
        apply(host, one, tmp_path, bound_datagrams(port, granted=False))
        one.resume()
        said = one.lines(4)[-1]
        assert came(far, 2) is None, said


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_connection_put_off_does_not_begin_at_an_endpoint_that_is_gone(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    port = host.port()
    with contextlib.closing(host.client.listener()) as far:
        steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 53, "cookieless", "option", SOL_TCP, 30]
        steps += ["connect", CLIENT4, far.getsockname()[1], "wait", "send", "-", "-", "wait"]
        one = confine(host, transport, bound_datagrams(port, granted=True), *steps)
        assert one.lines(5)[-1] == "connect ok"
        apply(host, one, tmp_path, bound_datagrams(port, granted=False))
        one.resume()
        assert source_of_next(far, 1) is None


# ---- a port of the program's choice (IP_LOCAL_PORT_RANGE), and whom it is taken from --------------------------------


def one_port(port: int) -> str:
    """A value of IP_LOCAL_PORT_RANGE."""
    return struct.pack("=I", port << 16 | port).hex()


def test_a_port_of_a_service_of_the_hosts_is_not_taken_from_it(host: Host, confine: Confine) -> None:
    port = 40837
    with host.netns.inside():
        service = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.closing(service), datagrams(host) as client:
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        service.bind(("0.0.0.0", port))
        steps = ["make", 2, 2, 0, "option", SOL_SOCKET, SO_REUSEADDR, "bytes", SOL_IP, 51, one_port(port)]
        one = confine(host, "direct", "name: t\ndefault: deny\n", *steps, "send", CLIENT4, 9, "wait")
        said = one.lines(4)
        assert said[-2:] == ["bytes EPERM", "send EACCES"]
        client.sendto(b"for the service", (HOST4, port))
        assert came(service, 2) == CLIENT4, said


def test_bind_deny_leaves_no_choice_of_a_port_to_be_heard_at(host: Host, confine: Confine) -> None:
    port = 40838
    text = "name: t\ndefault: {bind: deny, connect: container}\n"
    steps = ["make", 2, 2, 0, "bytes", SOL_IP, 51, one_port(port), "send", CLIENT4, 9, "wait", "receive", "wait"]
    one = confine(host, "direct", text, *steps)
    assert one.lines(3)[1] == "bytes EPERM"
    with datagrams(host) as client:
        client.sendto(b"stranger", (HOST4, port))
    one.resume()
    assert one.lines(4)[-1] == "receive none"


# ---- groups, where the socket holds no endpoint ---------------------------------------------------------------------


@pytest.mark.parametrize("default", ["deny", "{bind: container, connect: deny}"])
def test_a_32_bit_call_joins_no_group_without_an_endpoint_either(host: Host, confine: Confine, default: str) -> None:
    port = 40839
    text = f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\negress: [{{to: {CLIENT4}, endpoint: out}}]\n"
    join = (socket.inet_aton(GROUP4) + socket.inet_aton(HOST4)).hex()
    steps = ["make", 2, 2, 0, "range", port, port, "bytes", SOL_IP, 35, join, "bytes32", SOL_IP, 35, join]
    steps += ["send", CLIENT4, 9, "wait", "receive", "wait"]
    one = confine(host, "direct", f"{text}default: {default}\n", *steps)
    assert one.lines(5)[2:4] == ["bytes EPERM", "bytes32 ok"]
    send_to_group(host, port)
    one.resume()
    assert one.lines(6)[-1] == "receive none"


# ---- an endpoint that moves to another namespace --------------------------------------------------------------------


def test_a_datagram_socket_hears_nobody_when_its_endpoint_is_in_another_namespace(host: Host, confine: Confine) -> None:
    port = host.port()
    name = host.endpoint(f"0.0.0.0:{port}")
    text = f"name: t\ningress: [{{bind: '*:53', endpoint: {name}}}]\ndefault: deny\n"
    steps = ["make", 2, 2, 0, "bind", "0.0.0.0", 53, "wait", "receive", "wait"]
    one = confine(host, "direct", text, *steps)
    assert one.lines(2)[-1] == "bind ok"
    host.graft("ep", "set", name, f"0.0.0.0:{port}", "--netns", host.client.name)
    with datagrams(host) as client:
        client.sendto(b"stranger", (HOST4, port))
    one.resume()
    assert one.lines(3)[-1] == "receive none"


# ---- honest programs ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nat(host: Host, tmp_path: Path, hook: str, rule: str) -> Iterator[None]:
    """One rule of the host's NAT, for what its own processes send."""
    file = tmp_path / "nat.nft"
    file.write_text(f"table ip review {{\n chain c {{\n  type nat hook {hook}\n  {rule}\n }}\n}}\n")
    host.netns.run("nft", "-f", file)
    try:
        yield
    finally:
        host.netns.run("nft", "delete", "table", "ip", "review")


def to_service() -> str:
    rule = f"egress: [{{to: {SERVICE4}, endpoint: out}}]"
    return f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\n{rule}\ndefault: deny\n"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_granted_destination_that_the_hosts_nat_leads_elsewhere_is_reached(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    host.netns.run("ip", "route", "replace", f"{SERVICE4}/32", "via", CLIENT4)
    with contextlib.closing(host.client.listener()) as far:
        rule = f"ip daddr {SERVICE4} tcp dport 80 dnat to {CLIENT4}:{far.getsockname()[1]}"
        with nat(host, tmp_path, "output priority -100;", rule):
            host.netns.connected(SERVICE4, 80).close()  # anybody else on the host
            assert source_of_next(far) is not None
            confine(host, transport, to_service(), "make", 2, 1, 0, "connect", SERVICE4, 80, "wait")
            assert source_of_next(far, 2) is not None


def test_a_granted_datagram_that_the_hosts_nat_leads_elsewhere_comes(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    host.netns.run("ip", "route", "replace", f"{SERVICE4}/32", "via", CLIENT4)
    with datagrams(host) as far:
        rule = f"ip daddr {SERVICE4} udp dport 53 dnat to {CLIENT4}:{far.getsockname()[1]}"
        with nat(host, tmp_path, "output priority -100;", rule):
            confine(host, "direct", to_service(), "make", 2, 2, 0, "send", SERVICE4, 53, "wait")
            assert came(far, 2) == HOST4


def test_a_connected_datagram_that_the_host_masquerades_comes(host: Host, confine: Confine, tmp_path: Path) -> None:
    host.netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    host.client.run("ip", "route", "replace", f"{OTHER4}/32", "via", HOST4)
    text = f"name: t\nendpoints: {{out: '{OTHER4}:dynamic'}}\negress: [{{to: {CLIENT4}, endpoint: out}}]\n"
    with datagrams(host) as far, nat(host, tmp_path, "postrouting priority 100;", "oif eth0 masquerade"):
        port = far.getsockname()[1]
        steps = ["make", 2, 2, 0, "connect", CLIENT4, port, "send", "-", "-", "wait"]
        confine(host, "direct", f"{text}default: deny\n", *steps)
        assert came(far, 2) == HOST4
