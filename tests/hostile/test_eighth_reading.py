"""What an eighth reading found in the hooks: each was possible, and is not any more."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import Confine, Confined, Without, for_transport
from tests.hostile.test_afterwards import OTHER4, apply
from tests.hostile.test_datagrams import came, datagrams
from tests.hostile.test_more_ways import give_another_address
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.program import Program

pytestmark = pytest.mark.e2e
INET, INET6, STREAM, DGRAM = 2, 10, 1, 2
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
    text = (
        f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\negress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
    )
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
    assert is_made_without_its_rule(without("packets in"), confine, tmp_path, "direct").startswith(b"hello")


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
        f"egress: [{{to: {CLIENT4}, ports: [{granted}], endpoint: o4}}, {{to: '{CLIENT6}', endpoint: o6}}]\n"
        "default: deny\n"
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


# ---- two binds of one socket at the same time -----------------------------------------------------------

DATAGRAM_OR_STREAM = {2: "datagram", 1: "stream"}


def binds_twice(host: Host, programs: Programs, folder: Path, kind: int, seconds: int) -> tuple[Program, int]:
    """Whether the tag says something else than the kernel, after so many seconds; and the endpoint's port."""
    port = host.port()
    (folder / "both.yaml").write_text(
        f"name: t\nendpoints: {{web: '0.0.0.0:{port}', any: '0.0.0.0:dynamic'}}\n"
        "ingress: [{bind: '0.0.0.0:53', endpoint: web}, {bind: '0.0.0.0:0', endpoint: any}]\ndefault: deny\n"
    )
    words = ["--policy", folder / "both.yaml", "--user", "nobody", "--"]
    program = host.start(*words, programs["binding_twice"], kind, port, seconds, talk=True)
    program.until("a line", lambda: "\n" in program.said, seconds + 10)
    return program, port


@pytest.mark.parametrize("kind", DATAGRAM_OR_STREAM)
def test_two_binds_at_once_do_not_leave_a_tag_of_the_wrong_one(
    host: Host, programs: Programs, tmp_path: Path, kind: int
) -> None:
    program, _ = binds_twice(host, programs, tmp_path, kind, 4)
    assert program.said == "never\n"


def test_control_where_they_do_it_is_served_without_its_rule(
    without: Without, programs: Programs, tmp_path: Path
) -> None:
    host = without("binds at once")
    program, port = binds_twice(host, programs, tmp_path, STREAM, 60)
    assert program.said == "raced\n"
    (tmp_path / "less.yaml").write_text(
        "name: t\nendpoints: {any: '0.0.0.0:dynamic'}\ningress: [{bind: '0.0.0.0:0', endpoint: any}]\ndefault: deny\n"
    )
    host.graft("policy", "apply", tmp_path / "less.yaml")
    program.tell("\n")
    program.until("a listener", lambda: host.netns.listens(port))
    with host.client.connected(HOST4, port) as client:
        assert client.recv(6) == b"served"


# ---- a port that an endpoint of one family lends, in the other ------------------------------------------


@contextlib.contextmanager
def service(host: Host, family: int, port: int) -> Iterator[socket.socket]:
    """A datagram service of the host's at all addresses of that family, which lets others have its port too."""
    with host.netns.inside():
        sock = socket.socket(family, socket.SOCK_DGRAM)
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::" if family == INET6 else "0.0.0.0", port))
        sock.settimeout(2)
        yield sock


def is_heard(host: Host, sock: socket.socket, address: str, port: int) -> bool:
    with datagrams(host, CLIENT6 if ":" in address else CLIENT4) as far:
        far.sendto(b"secret", (address, port))
    try:
        return sock.recv(100) == b"secret"
    except TimeoutError:
        return False


def both_families(four: str, six: str) -> str:
    return (
        f"name: t\nendpoints: {{four: {four}, six: {six}}}\n"
        "egress: [{to: 0.0.0.0/0, endpoint: four}, {to: '::/0', endpoint: six}]\ndefault: deny\n"
    )


def loses_its_datagrams(host: Host, confine: Confine, transport: str, connected: bool) -> bool:
    """Whether an IPv6 service does, when an IPv6 socket is lent the IPv4 port of that number.

    The socket is connected by an IPv4 address (struct sockaddr_in), then to nobody; or that does not succeed.
    """
    port = host.port()
    policy = both_families(f"'{'0.0.0.0' if connected else HOST4}:{port}'", "'[::]:dynamic'")
    steps = ["make", INET6, DGRAM, 0, "option", 1, 2]  # SO_REUSEADDR
    steps += ["connect", CLIENT4, 9, "unspec"] if connected else ["connect", "255.255.255.255", 9]
    with service(host, INET6, port) as one:
        confine(host, transport, policy, *steps, "wait").lines(4 if connected else 3)
        return not is_heard(host, one, HOST6, port)


@pytest.mark.parametrize("transport", ["born", "direct"])
@pytest.mark.parametrize("connected", [False, True])
def test_an_ipv6_socket_that_gets_an_ipv4_port_takes_none_in_ipv6(
    host: Host, confine: Confine, transport: str, connected: bool
) -> None:
    assert not loses_its_datagrams(host, confine, transport, connected)


def test_control_where_it_is_bound_as_an_ipv4_socket_it_does(without: Without, confine: Confine) -> None:
    assert loses_its_datagrams(without("lent family"), confine, "direct", False)


def test_nor_at_any_other_address(host: Host, confine: Confine) -> None:
    port = host.port()
    policy = both_families(f"'{HOST4}:{port}'", "'[::]:dynamic'")
    one = confine(host, "direct", policy, "make", INET6, DGRAM, 0, "connect", "255.255.255.255", 9, "name", "wait")
    assert one.lines(3)[-1] == f"name ::ffff:{HOST4} {port}"
    for address in ("127.0.0.1", HOST6, "::1"):
        with host.netns.inside():
            sock = socket.socket(INET6 if ":" in address else INET, socket.SOCK_DGRAM)
        with sock:
            sock.bind((address, port))


def test_it_leaves_from_where_its_endpoint_is_now(host: Host, confine: Confine) -> None:
    """It was bound to all addresses, and so not known to have another one."""
    give_another_address(host)
    name = host.endpoint(f"{OTHER4}:dynamic")
    text = f"name: t\negress: [{{to: 0.0.0.0/0, endpoint: {name}}}]\ndefault: deny\n"
    with datagrams(host) as far:
        steps = ["make", INET6, DGRAM, 0, "connect", "255.255.255.255", 9, "wait"]
        one = confine(host, "born", text, *steps, "send", CLIENT4, far.getsockname()[1], "wait")
        one.lines(2)
        host.graft("ep", "set", name, "0.0.0.0:dynamic")
        one.resume()
        one.lines(3)
        assert came(far) != OTHER4


def six_with_port(
    host: Host, confine: Confine, transport: str, only: bool, dual: bool, kind: int
) -> tuple[Confined, int]:
    """A socket connects over IPv6, from an endpoint that is a port at all addresses."""
    port = host.port()
    policy = both_families("'0.0.0.0:dynamic'", f"{{address: '[::]:{port}', dual_stack: {str(dual).lower()}}}")
    steps = ["make", INET6, kind, 0, "bytes", 41, 26, "01000000" if only else "00000000", "connect", CLIENT6, 9, "wait"]
    return confine(host, transport, policy, *steps), port


def takes_ipv4(host: Host, port: int, kind: int) -> bool:
    with host.netns.inside():
        sock = socket.socket(INET, kind)
    with sock:
        try:
            sock.bind(("0.0.0.0", port))
        except OSError:
            return True
    return False


@pytest.mark.parametrize("kind", [DGRAM, STREAM])
@pytest.mark.parametrize("transport", ["born", "direct"])
def test_a_socket_that_would_take_the_ipv4_port_too_is_not_lent_an_ipv6_one(
    host: Host, confine: Confine, transport: str, kind: int
) -> None:
    one, port = six_with_port(host, confine, transport, False, False, kind)
    assert one.lines(3)[2] == "connect EACCES"
    assert not takes_ipv4(host, port, kind)


def test_control_where_it_is_it_takes_both(without: Without, confine: Confine) -> None:
    host = without("lent family")
    one, port = six_with_port(host, confine, "direct", False, False, STREAM)
    one.lines(3)
    assert takes_ipv4(host, port, STREAM)


@pytest.mark.parametrize(("only", "dual"), [(True, False), (False, True)])
def test_one_that_does_not_is_and_one_whose_endpoint_has_both(
    host: Host, confine: Confine, only: bool, dual: bool
) -> None:
    one, port = six_with_port(host, confine, "direct", only, dual, DGRAM)
    assert one.lines(3)[2] == "connect ok"
    assert takes_ipv4(host, port, DGRAM) is dual


@pytest.mark.parametrize("dual", [False, True])
def test_in_swap_the_replacement_socket_takes_the_ipv6_port_only(host: Host, confine: Confine, dual: bool) -> None:
    with contextlib.closing(host.client.listener(CLIENT6)) as far:
        port = host.port()
        policy = both_families("'0.0.0.0:dynamic'", f"{{address: '[::]:{port}', dual_stack: {str(dual).lower()}}}")
        steps = ["make", INET6, STREAM, 0, "connect", CLIENT6, far.getsockname()[1], "wait"]
        assert confine(host, "swap", policy, *steps).lines(2)[1] == "connect ok"
        assert takes_ipv4(host, port, STREAM) is dual


def test_a_port_means_nothing_in_the_other_family_when_its_lender_is_gone(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    port = host.port()
    open_policy = "default: {bind: deny, connect: container}\n"
    text = f"name: t\nendpoints: {{out: '0.0.0.0:{port}'}}\negress: [{{to: {CLIENT4}, endpoint: out}}]\n{open_policy}"
    with datagrams(host, CLIENT6) as far:
        steps = ["make", INET6, DGRAM, 0, "connect", f"::ffff:{CLIENT4}", 9, "unspec", "wait"]
        one = confine(host, "direct", text, *steps, "send", CLIENT6, far.getsockname()[1], "wait")
        one.lines(3)
        apply(host, one, tmp_path, f"name: t\n{open_policy}")
        one.resume()
        assert one.lines(4)[3] == "send EACCES"
        assert came(far) is None
