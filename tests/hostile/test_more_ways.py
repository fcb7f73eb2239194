"""Ways past a policy by a source, a port, a group, an endpoint elsewhere; and honest programs that no hook may stop."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Without
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


def address_of_next(far: socket.socket) -> str:
    """The address that a connection which is there comes from."""
    found = source_of_next(far)
    assert found, "no connection comes"
    return found[0]


# ---- a source address that stays when its endpoint is gone -------------------------------------------------------

TO_CLIENT = f"egress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
WITHOUT = f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\n{TO_CLIENT}"
WITH_ANOTHER = (
    f"name: t\nendpoints: {{other: '{OTHER4}:dynamic', out: '0.0.0.0:dynamic'}}\n"
    f"ingress: [{{bind: '*:80', endpoint: other}}]\n{TO_CLIENT}"
)


def give_another_address(host: Host) -> None:
    host.netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    host.client.run("ip", "route", "replace", f"{OTHER4}/32", "via", HOST4)


def connects_from(host: Host, confine: Confine, folder: Path, transport: str) -> str | None:
    """The source of a connection, of a socket that listened at an endpoint that is gone; None: it is refused."""
    give_another_address(host)
    with contextlib.closing(host.client.listener()) as far:
        steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 80, "listen", "unspec", "wait"]
        steps += ["connect", CLIENT4, far.getsockname()[1], "wait"]
        one = confine(host, transport, WITH_ANOTHER, *steps)
        assert one.lines(4)[-1] == "unspec ok"
        apply(host, one, folder, WITHOUT)
        one.resume()
        return address_of_next(far) if one.lines(5)[-1] == "connect ok" else None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_connection_leaves_from_the_address_of_an_endpoint_that_is_gone(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    assert connects_from(host, confine, tmp_path, transport) in (None, HOST4)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_nobody_looks_at_that_a_connection_does(
    without: Without, confine: Confine, tmp_path: Path, transport: str
) -> None:
    assert connects_from(without("lost"), confine, tmp_path, transport) == OTHER4


def sends_from(host: Host, confine: Confine, folder: Path) -> str | None:
    """The source of a datagram, of a socket that was bound to an endpoint that is gone; None: no datagram comes."""
    give_another_address(host)
    with datagrams(host) as far:
        steps = ["make", 2, 2, 0, "bind", "0.0.0.0", 80, "unspec", "wait", "send", CLIENT4, far.getsockname()[1]]
        one = confine(host, "direct", WITH_ANOTHER, *steps, "wait")
        assert one.lines(3)[-1] == "unspec ok"
        apply(host, one, folder, WITHOUT)
        one.resume()
        return came(far, 2 if one.lines(4)[-1] == "send ok" else 0.1)


def test_no_datagram_leaves_from_the_address_of_an_endpoint_that_is_gone(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    assert sends_from(host, confine, tmp_path) in (None, HOST4)


def test_control_where_nobody_looks_at_that_a_datagram_does(without: Without, confine: Confine, tmp_path: Path) -> None:
    assert sends_from(without("lost"), confine, tmp_path) == OTHER4


def connects_from_moved(host: Host, confine: Confine, transport: str) -> str | None:
    """The source of a second connection, when the endpoint has moved since the first; None: the connect is refused."""
    give_another_address(host)
    name = host.endpoint(f"{OTHER4}:dynamic")
    text = f"name: t\negress: [{{to: {CLIENT4}, endpoint: {name}}}]\ndefault: deny\n"
    with contextlib.closing(host.client.listener()) as far:
        port = far.getsockname()[1]
        steps = ["make", 2, 1, 0, "connect", CLIENT4, port, "unspec", "wait", "connect", CLIENT4, port, "wait"]
        one = confine(host, transport, text, *steps)
        assert one.lines(3)[1:] == ["connect ok", "unspec ok"]
        assert address_of_next(far) == OTHER4
        host.graft("ep", "set", name, "0.0.0.0:dynamic")
        one.resume()
        return address_of_next(far) if one.lines(4)[-1] == "connect ok" else None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_endpoint_that_moved_is_no_source_at_its_old_address(host: Host, confine: Confine, transport: str) -> None:
    assert connects_from_moved(host, confine, transport) in (None, HOST4)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_nobody_looks_at_that_it_is(without: Without, confine: Confine, transport: str) -> None:
    assert connects_from_moved(without("lost"), confine, transport) == OTHER4


# ---- a datagram socket whose endpoint is gone, with a wide egress rule ----------------------------------------------


def bound_datagrams(port: int, granted: bool) -> str:
    ingress = "ingress: [{bind: '*:53', endpoint: dns}]\n" if granted else ""
    return (
        f"name: t\nendpoints: {{dns: '0.0.0.0:{port}', out: '0.0.0.0:dynamic'}}\n{ingress}"
        f"egress: [{{to: 0.0.0.0/0, endpoint: out}}]\ndefault: deny\n"
    )


def hears_when_gone(host: Host, confine: Confine, folder: Path) -> str:
    """What it says of a stranger's datagram, at an endpoint that is gone."""
    port = host.port()
    steps = ["make", 2, 2, 0, "bind", "0.0.0.0", 53, "wait", "receive", "wait"]
    one = confine(host, "direct", bound_datagrams(port, granted=True), *steps)
    assert one.lines(2)[-1] == "bind ok"
    apply(host, one, folder, bound_datagrams(port, granted=False))
    with datagrams(host) as client:
        client.sendto(b"stranger", (HOST4, port))
    one.resume()
    return one.lines(3)[-1]


def test_a_datagram_socket_hears_nobody_at_an_endpoint_that_is_gone(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    assert hears_when_gone(host, confine, tmp_path) == "receive none"


def test_control_where_nobody_looks_at_that_it_hears(without: Without, confine: Confine, tmp_path: Path) -> None:
    assert hears_when_gone(without("lost"), confine, tmp_path) == "receive stranger"


def sends_when_gone(host: Host, confine: Confine, folder: Path) -> str | None:
    """The source of a datagram of a connected socket, at an endpoint that is gone; None: no datagram comes."""
    port = host.port()
    with datagrams(host) as far:
        steps = ["make", 2, 2, 0, "bind", "0.0.0.0", 53, "connect", CLIENT4, far.getsockname()[1], "wait"]
        one = confine(host, "direct", bound_datagrams(port, granted=True), *steps, "send", "-", "-", "wait")
        assert one.lines(3)[-1] == "connect ok"
        apply(host, one, folder, bound_datagrams(port, granted=False))
        one.resume()
        one.lines(4)  # it has been sent, or not
        return came(far)


def test_a_connected_datagram_socket_sends_no_more_from_an_endpoint_that_is_gone(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    assert sends_when_gone(host, confine, tmp_path) is None


def test_control_where_nobody_looks_at_that_it_sends(without: Without, confine: Confine, tmp_path: Path) -> None:
    assert sends_when_gone(without("lost"), confine, tmp_path) == HOST4


def begins_at(host: Host, confine: Confine, folder: Path, transport: str, port: int) -> tuple[str, int] | None:
    """The source of a connection that was put off until the endpoint that it is bound to was gone; None: none comes."""
    with contextlib.closing(host.client.listener()) as far:
        steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 53, "cookieless", "option", SOL_TCP, 30]
        steps += ["connect", CLIENT4, far.getsockname()[1], "wait", "send", "-", "-", "wait"]
        one = confine(host, transport, bound_datagrams(port, granted=True), *steps)
        assert one.lines(5)[-1] == "connect ok"
        apply(host, one, folder, bound_datagrams(port, granted=False))
        one.resume()
        return source_of_next(far, 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_connection_put_off_does_not_begin_at_an_endpoint_that_is_gone(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    assert begins_at(host, confine, tmp_path, transport, host.port()) is None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_nobody_looks_at_that_it_begins(
    without: Without, confine: Confine, tmp_path: Path, transport: str
) -> None:
    port = Host.port()
    assert begins_at(without("lost"), confine, tmp_path, transport, port) == (HOST4, port)


# ---- a port of the program's choice (IP_LOCAL_PORT_RANGE), and whom it is taken from --------------------------------


def one_port(port: int) -> str:
    """A value of IP_LOCAL_PORT_RANGE."""
    return struct.pack("=I", port << 16 | port).hex()


def takes_a_services_port(host: Host, confine: Confine) -> tuple[list[str], str | None]:
    """What it says of the option and of a send, and where the next datagram of the host's service is from."""
    port = 40837
    with host.netns.inside():
        service = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.closing(service), datagrams(host) as client:
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        service.bind(("0.0.0.0", port))
        steps = ["make", 2, 2, 0, "option", SOL_SOCKET, SO_REUSEADDR, "bytes", SOL_IP, 51, one_port(port)]
        one = confine(host, "direct", "name: t\ndefault: deny\n", *steps, "send", CLIENT4, 9, "wait")
        said = one.lines(4)[-2:]
        client.sendto(b"for the service", (HOST4, port))
        return said, came(service)


def test_a_port_of_a_service_of_the_hosts_is_not_taken_from_it(host: Host, confine: Confine) -> None:
    assert takes_a_services_port(host, confine) == (["bytes EPERM", "send EACCES"], CLIENT4)


def test_control_where_any_option_may_be_set_it_is(without: Without, confine: Confine) -> None:
    assert takes_a_services_port(without("options"), confine) == (["bytes ok", "send EACCES"], None)


def hears_at_its_choice(host: Host, confine: Confine) -> list[str]:
    """What it says of the option, and of a stranger's datagram to that port."""
    port = 40838
    text = "name: t\ndefault: {bind: deny, connect: container}\n"
    steps = ["make", 2, 2, 0, "bytes", SOL_IP, 51, one_port(port), "send", CLIENT4, 9, "wait", "receive", "wait"]
    one = confine(host, "direct", text, *steps)
    one.lines(3)
    with datagrams(host) as client:
        client.sendto(b"stranger", (HOST4, port))
    one.resume()
    return one.lines(4)[1::2]


def test_bind_deny_leaves_no_choice_of_a_port_to_be_heard_at(host: Host, confine: Confine) -> None:
    assert hears_at_its_choice(host, confine) == ["bytes EPERM", "receive none"]


def test_control_where_any_option_may_be_set_it_leaves_one(without: Without, confine: Confine) -> None:
    assert hears_at_its_choice(without("options"), confine) == ["bytes ok", "receive stranger"]


# ---- groups, where the socket holds no endpoint ---------------------------------------------------------------------


def hears_a_group(host: Host, confine: Confine, default: str) -> str:
    """What it says of a stranger's datagram to a group that it has joined by a 32-bit call."""
    port = 40839
    text = f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\negress: [{{to: {CLIENT4}, endpoint: out}}]\n"
    join = (socket.inet_aton(GROUP4) + socket.inet_aton(HOST4)).hex()
    steps = ["make", 2, 2, 0, "range", port, port, "bytes", SOL_IP, 35, join, "bytes32", SOL_IP, 35, join]
    steps += ["send", CLIENT4, 9, "wait", "receive", "wait"]
    one = confine(host, "direct", f"{text}default: {default}\n", *steps)
    assert one.lines(5)[2:4] == ["bytes EPERM", "bytes32 ok"]
    send_to_group(host, port)
    one.resume()
    return one.lines(6)[-1]


@pytest.mark.parametrize("default", ["deny", "{bind: container, connect: deny}"])
def test_a_32_bit_call_joins_no_group_without_an_endpoint_either(host: Host, confine: Confine, default: str) -> None:
    assert hears_a_group(host, confine, default) == "receive none"


def test_control_without_a_look_at_packets_it_joins_one(without: Without, confine: Confine) -> None:
    assert hears_a_group(without("packets in"), confine, "deny") == "receive stranger"


# ---- an endpoint that moves to another namespace --------------------------------------------------------------------


def hears_from_elsewhere(host: Host, confine: Confine) -> str:
    """What it says of a stranger's datagram, when its endpoint is one of another namespace's."""
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
    return one.lines(3)[-1]


def test_a_datagram_socket_hears_nobody_when_its_endpoint_is_in_another_namespace(host: Host, confine: Confine) -> None:
    assert hears_from_elsewhere(host, confine) == "receive none"


def test_control_without_a_look_at_packets_it_hears(without: Without, confine: Confine) -> None:
    assert hears_from_elsewhere(without("packets in"), confine) == "receive stranger"


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
