"""What an eighth reading found in the hooks: each was possible, and is not any more."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import Confine, Confined, Without, for_transport, lines_of
from tests.hostile.test_afterwards import OTHER4, apply
from tests.hostile.test_datagrams import came, datagrams
from tests.hostile.test_more_ways import give_another_address
from tests.hostile.test_sixth_reading import OTHER6, WITH_NET_RAW
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.program import Program
from tests.support.shell import Word

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
    words: list[Word] = ["--policy", folder / "both.yaml", "--user", "nobody", "--"]
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


def unreachable(host: Host) -> str:
    """An address that a connect fails to, after its hook has given the socket a source."""
    host.netns.run("ip", "route", "replace", "unreachable", "198.18.0.0/15")
    return "198.18.0.1"


def loses_its_datagrams(host: Host, confine: Confine, transport: str, connected: bool) -> bool:
    """Whether an IPv6 service does, when an IPv6 socket is lent the IPv4 port of that number.

    The socket is connected by an IPv4 address (struct sockaddr_in), then to nobody; or that does not succeed.
    """
    port = host.port()
    policy = both_families(f"'{'0.0.0.0' if connected else HOST4}:{port}'", "'[::]:dynamic'")
    steps = ["make", INET6, DGRAM, 0, "option", 1, 2]  # SO_REUSEADDR
    steps += ["connect", CLIENT4, 9, "unspec"] if connected else ["connect", unreachable(host), 9]
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
    one = confine(host, "direct", policy, "make", INET6, DGRAM, 0, "connect", unreachable(host), 9, "name", "wait")
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
        steps = ["make", INET6, DGRAM, 0, "connect", unreachable(host), 9, "wait"]
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
def test_a_socket_that_would_take_the_ipv4_port_too_is_not_lent_an_ipv6_one(
    host: Host, confine: Confine, kind: int
) -> None:
    one, port = six_with_port(host, confine, "direct", False, False, kind)
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


# ---- a source that the host does not have ---------------------------------------------------------------

FOREIGN6, FOREIGN4 = "fd98::77", "198.51.100.7"
SET_BY = {
    "setsockopt": ("option", 41, 78),
    "32-bit call": ("bytes32", 0, 15, "01000000"),
    "nothing": ("option", 41, 49),
}


def source6(address: str) -> str:
    return (socket.inet_pton(INET6, address) + bytes(4)).hex()


def source4(address: str) -> str:
    return (bytes(4) + socket.inet_aton(address) + bytes(4)).hex()


def serving(port: int, address: str, *to: str) -> str:
    """The policy of a datagram server at that port of all addresses."""
    rules = ", ".join(f"{{to: '{one}', endpoint: out{6 if ':' in one else 4}}}" for one in to)
    return (
        f"name: t\nendpoints: {{web: {{address: '{address}:{port}', dual_stack: {str(':' in address).lower()}}}, "
        f"out4: '0.0.0.0:dynamic', out6: '[::]:dynamic'}}\n"
        f"ingress: [{{bind: '{address}:53', endpoint: web}}]\negress: [{rules}]\ndefault: deny\n"
    )


def answers_as(host: Host, confine: Confine, transport: str, how: str) -> str | None:
    """The source of a server's datagram that names one which is not the host's."""
    port = host.port()
    with datagrams(host, CLIENT6) as far:
        host.client.run("ip", "route", "replace", f"{FOREIGN6}/128", "via", HOST6)
        to = [CLIENT6, far.getsockname()[1]]
        steps = [
            "make",
            INET6,
            DGRAM,
            0,
            *SET_BY[how],
            "bind",
            "::",
            53,
            "cmsg",
            41,
            50,
            source6(FOREIGN6),
            *to,
            "wait",
        ]
        confine(host, transport, serving(port, "[::]", CLIENT6), *steps).lines(4)
        return came(far)


@pytest.mark.parametrize("transport", ["born", "direct"])
@pytest.mark.parametrize("how", SET_BY)
def test_no_datagram_has_the_address_of_another_host(host: Host, confine: Confine, transport: str, how: str) -> None:
    assert answers_as(host, confine, transport, how) is None


@pytest.mark.parametrize("how", ["setsockopt", "32-bit call"])
def test_control_where_nobody_asks_whose_address_it_is_it_has(without: Without, confine: Confine, how: str) -> None:
    assert answers_as(without("foreign source"), confine, "direct", how) == FOREIGN6


@pytest.mark.parametrize("transparent", [True, False])
def test_nor_in_ipv4_with_CAP_NET_RAW(host: Host, programs: Programs, tmp_path: Path, transparent: bool) -> None:
    port = host.port()
    file = tmp_path / "policy.yaml"
    file.write_text(serving(port, "0.0.0.0", CLIENT4))
    with datagrams(host) as far:
        option = ["bytes32", 0, 19 if transparent else 10, "01000000"]
        cmsg = ["cmsg", 0, 8, source4(FOREIGN4), CLIENT4, far.getsockname()[1]]
        words = [
            *WITH_NET_RAW,
            programs["calls"],
            "make",
            INET,
            DGRAM,
            0,
            *option,
            "bind",
            "0.0.0.0",
            53,
            *cmsg,
            "wait",
        ]
        said = lines_of(host.start("--policy", file, "--", *words, talk=True), 4)
        assert said[1:3] == ["bytes32 ok", "bind ok"]
        assert came(far) is None


@pytest.mark.parametrize("family", [INET, INET6])
def test_a_server_answers_from_the_address_that_its_client_asked(host: Host, confine: Confine, family: int) -> None:
    """And from none at which it has not been asked, nor any other socket of the host's under a policy."""
    give_another_address(host)
    host.netns.run("ip", "address", "replace", f"{OTHER6}/128", "dev", "lo")
    host.client.run("ip", "route", "replace", f"{OTHER6}/128", "via", HOST6)
    port = host.port()
    other, client, every = (OTHER4, CLIENT4, "0.0.0.0") if family == INET else (OTHER6, CLIENT6, "::")
    named = ["cmsg", 0, 8, source4(OTHER4)] if family == INET else ["cmsg", 41, 50, source6(OTHER6)]
    with datagrams(host, client) as far:
        steps = ["make", family, DGRAM, 0, "bind", every, 53, "wait", "receive"]
        policy = serving(port, "[::]" if family == INET6 else every, client)
        one = confine(host, "direct", policy, *steps, *named, client, far.getsockname()[1], "wait")
        one.lines(2)
        far.sendto(b"asked", (other, port))
        one.resume()
        assert one.lines(4)[3] == "cmsg ok"
        assert came(far) == other


# ---- receiving at what an endpoint lent -----------------------------------------------------------------


def receives_when_its_lender_is_gone(host: Host, confine: Confine, folder: Path, transport: str, lent: str) -> str:
    """At an address and a port of one endpoint, which is gone; what the program may send to is another one's now."""
    port = host.port() if lent == "port" else "dynamic"
    text = "name: t\nendpoints: {{{name}: '{at}'}}\negress: [{{to: 0.0.0.0/0, endpoint: {name}}}]\ndefault: deny\n"
    steps = ["make", INET, DGRAM, 0, "connect", CLIENT4, 9, "unspec", "name", "wait", "receive", "wait"]
    with datagrams(host) as far:
        one = confine(host, transport, text.format(name="lends", at=f"{HOST4}:{port}"), *steps)
        near = int(one.lines(4)[3].split()[-1])
        apply(host, one, folder, for_transport(transport, text.format(name="other", at="0.0.0.0:dynamic")))
        far.sendto(b"stranger", (HOST4, near))
        one.resume()
        return one.lines(5)[4]


@pytest.mark.parametrize("transport", ["born", "direct"])
def test_it_receives_nothing_at_a_lent_port_whose_endpoint_is_gone(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    assert receives_when_its_lender_is_gone(host, confine, tmp_path, transport, "port") == "receive none"


def test_control_where_nobody_asks_whose_port_it_is_it_does(without: Without, confine: Confine, tmp_path: Path) -> None:
    assert (
        receives_when_its_lender_is_gone(without("lost source"), confine, tmp_path, "direct", "port") != "receive none"
    )


# ---- marks ----------------------------------------------------------------------------------------------


def test_without_CAP_NET_RAW_no_datagram_is_marked(host: Host, confine: Confine) -> None:
    """With it, one is, by a control message, and no hook can tell that mark from one of the host's firewall."""
    text = (
        f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\negress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
    )
    with datagrams(host) as far:
        steps = ["make", INET, DGRAM, 0, "cmsg", 1, 36, "07000000", CLIENT4, far.getsockname()[1], "wait"]  # SO_MARK
        assert confine(host, "born", text, *steps).lines(2)[1] == "cmsg EPERM"
        assert came(far) is None
