"""Ways onto the host's stack that open when something has changed: a rule, a port, an option, the container's end."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import cgroup
from graft.kernel.pidfd import pidfd_getfd
from tests.hostile.conftest import TRANSPORTS, Confine, Confined, Without
from tests.hostile.test_datagrams import GROUP4, came, datagrams, send_to_group
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e

OTHER4 = "10.98.0.79"
LISTEN = {"swap": "listen32", "born": "listen", "direct": "listen"}
SOL_IP, SOL_SOCKET, SOL_TCP, SOL_IPV6 = 0, 1, 6, 41


def reaches(host: Host, address: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        host.client.connected(address, port, timeout=1).close()
        return True
    return False


def apply(host: Host, one: Confined, folder: Path, text: str) -> None:
    (folder / "next.yaml").write_text(text)
    host.graft("policy", "apply", folder / "next.yaml", "--cgroup", one.cgroup)


EGRESS = "name: t\nendpoints: {{out: '{out}:dynamic'}}\negress: [{{to: {to}, endpoint: out}}]\ndefault: {default}\n"


# ---- options by 32-bit calls -----------------------------------------------------------------------------------

# The kernel does not show them to the hook. What they do is seen where it would matter.
TIES = {
    "SO_BINDTODEVICE": (SOL_SOCKET, 25, b"lo".hex()),
    "SO_BINDTOIFINDEX": (SOL_SOCKET, 62, struct.pack("=i", 1).hex()),
}


def tied(host: Host, confine: Confine, transport: str, option: tuple[int, int, str], *calls: str) -> list[str]:
    """A refused connection leaves a socket that is the host's, and free; these calls tie it, and it connects again."""
    text = EGRESS.format(out="0.0.0.0", to=CLIENT4, default="deny")
    ties = [word for call in calls for word in (call, *option)]
    steps = ["make", 2, 1, 0, "connect", CLIENT4, 9, *ties, "connect", CLIENT4, 9, "wait"]
    return confine(host, transport, text, *steps).lines(3 + len(calls))[1:]


@pytest.mark.parametrize("option", TIES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_socket_that_a_32_bit_call_has_tied_to_an_interface_goes_nowhere(
    host: Host, confine: Confine, transport: str, option: str
) -> None:
    lines = tied(host, confine, transport, TIES[option], "bytes", "bytes32")
    assert lines[:2] == ["connect ECONNREFUSED", "bytes EPERM"]
    assert lines[3] == "connect EACCES"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_nobody_looks_at_that_it_goes_by_its_interface(
    without: Without, confine: Confine, transport: str
) -> None:
    host = without("options")
    with host.netns.inside():
        index = socket.if_nametoindex("eth0")  # where the destination is, so that there is an answer
    lines = tied(host, confine, transport, (SOL_SOCKET, 62, struct.pack("=i", index).hex()), "bytes32")
    assert lines == ["connect ECONNREFUSED", "bytes32 ok", "connect ECONNREFUSED"]


def hears_a_group(host: Host, confine: Confine) -> str:
    """What it says of a stranger's datagram to a group that it has joined by a 32-bit call."""
    port = host.port()
    text = f"name: t\nendpoints: {{dns: 0.0.0.0:{port}}}\ningress: [{{bind: '*:53', endpoint: dns}}]\ndefault: deny\n"
    join = (socket.inet_aton(GROUP4) + socket.inet_aton(HOST4)).hex()
    steps = ["make", 2, 2, 0, "bind", "0.0.0.0", 53, "bytes32", SOL_IP, 35, join, "wait", "receive", "wait"]
    one = confine(host, "direct", text, *steps)
    one.lines(3)
    send_to_group(host, port)
    one.resume()
    return one.lines(4)[-1]


def test_a_32_bit_call_joins_no_group_of_the_hosts_links(host: Host, confine: Confine) -> None:
    assert hears_a_group(host, confine) == "receive none"


def test_control_without_a_look_at_packets_it_joins_one(without: Without, confine: Confine) -> None:
    assert hears_a_group(without("packets in"), confine) == "receive stranger"


# ---- what the supervisor does with root's rights -----------------------------------------------------------------


def binds_privileged(host: Host, confine: Confine, defence: str = "") -> list[str]:
    """What nobody's binds of a privileged port say: of a socket of the container's own, and of one with the host."""
    text = EGRESS.format(out="0.0.0.0", to=CLIENT4, default="container")
    steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 81]
    steps += ["make", 2, 1, 0, "connect", CLIENT4, 9, "bind", "0.0.0.0", 81, "listen", "home", "wait"]
    return confine(host, "swap", text, *steps, defence=defence).lines(7)[1:5:3]


def test_the_supervisor_binds_no_privileged_port_for_who_may_not(host: Host, confine: Confine) -> None:
    assert binds_privileged(host, confine) == ["bind EACCES", "bind EACCES"]


def test_control_where_the_supervisor_makes_every_bind_it_does(host: Host, confine: Confine) -> None:
    assert binds_privileged(host, confine, "own binds") == ["bind EACCES", "bind ok"]


# ---- a connection that begins after its rule is gone ---------------------------------------------------------------


def begins(host: Host, confine: Confine, folder: Path, transport: str) -> bool:
    """Whether a connection comes that was put off (TCP_FASTOPEN_CONNECT) until its rule was gone."""
    with contextlib.closing(host.client.listener()) as far:
        steps = ["make", 2, 1, 0, "cookieless", "option", SOL_TCP, 30]
        steps += ["connect", CLIENT4, far.getsockname()[1], "wait", "send", "-", "-", "wait"]
        one = confine(host, transport, EGRESS.format(out="0.0.0.0", to=CLIENT4, default="deny"), *steps)
        assert one.lines(4)[-1] == "connect ok"
        apply(host, one, folder, EGRESS.format(out="0.0.0.0", to="192.0.2.1", default="deny"))
        one.resume()  # its send waits where the first packet is lost
        far.settimeout(2 * PATIENCE)
        try:
            far.accept()[0].close()
        except TimeoutError:
            return False
        return True


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_connection_put_off_does_not_begin_when_its_rule_is_gone(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    assert not begins(host, confine, tmp_path, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_without_a_look_at_packets_it_begins(
    without: Without, confine: Confine, tmp_path: Path, transport: str
) -> None:
    assert begins(without("packets out"), confine, tmp_path, transport)


# ---- an IPv6 endpoint, and the IPv4 port of its number --------------------------------------------------------------


def serves_ipv4(host: Host, confine: Confine, transport: str) -> bool:
    """Whether a listener at an IPv6 endpoint takes IPv4, when it has let go of its port and got it back."""
    text = "name: t\nendpoints: {six: '[::]:dynamic'}\ningress: [{bind: '*:80', endpoint: six}]\ndefault: deny\n"
    steps = ["make", 10, 1, 0, "option", SOL_IPV6, 26, "bind", "::", 80, "listen", "wait"]
    steps += ["unspec", "bytes", SOL_IPV6, 26, "00000000", "range", "-", "-", LISTEN[transport], "wait"]
    one = confine(host, transport, text, *steps)
    one.lines(4)
    [port] = re.findall(r"\]:(\d+) ", host.netns.run("ss", "-Hltn"))[-1:]
    one.resume()
    one.program.tell(f"{port}\n")
    assert one.lines(8)[-1] == f"{LISTEN[transport]} ok"
    return reaches(host, HOST4, int(port))


@pytest.mark.parametrize("transport", ("swap", "direct"))
def test_a_dynamic_ipv6_endpoint_serves_no_ipv4_after_a_disconnect(
    host: Host, confine: Confine, transport: str
) -> None:
    assert not serves_ipv4(host, confine, transport)


@pytest.mark.parametrize("transport", ("swap", "direct"))
def test_control_where_nobody_looks_at_the_family_it_does(without: Without, confine: Confine, transport: str) -> None:
    assert serves_ipv4(without("ipv4"), confine, transport)


# ---- datagrams' sources -------------------------------------------------------------------------------------------


def sends_ipv4_from(host: Host, confine: Confine) -> str | None:
    """The source of an IPv4 datagram of an IPv6 socket that names another one; None: none comes."""
    host.netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    text = (
        f"name: t\nendpoints: {{six: '[{HOST6}]:dynamic', out: '{HOST4}:dynamic'}}\n"
        f"ingress: [{{bind: '*:80', endpoint: six}}]\negress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
    )
    where = struct.pack("=i4s4s", 0, socket.inet_aton(OTHER4), bytes(4)).hex()
    with datagrams(host) as far:
        steps = ["make", 10, 2, 0, "bind", "::", 80, "wait", "unspec", "bytes", SOL_IPV6, 26, "00000000"]
        steps += ["range", "-", "-", "cmsg", SOL_IP, 8, where, f"::ffff:{CLIENT4}", far.getsockname()[1], "wait"]
        one = confine(host, "direct", text, *steps)
        assert one.lines(2)[-1] == "bind ok"
        port = re.findall(r"\]:(\d+) ", host.netns.run("ss", "-Hlun"))[-1]
        one.resume()
        one.program.tell(f"{port}\n")
        one.lines(6)
        return came(far)


def test_an_ipv6_socket_sends_ipv4_from_the_rules_endpoint_only(host: Host, confine: Confine) -> None:
    assert sends_ipv4_from(host, confine) in (None, HOST4)


def test_control_where_a_datagram_may_name_its_source_it_does(without: Without, confine: Confine) -> None:
    assert sends_ipv4_from(without("source"), confine) == OTHER4


# ---- what is bound keeps a port that is nobody's any more ---------------------------------------------------


def connects_from_a_lost_endpoint(host: Host, confine: Confine, folder: Path, transport: str) -> str:
    """What a connect says from an endpoint whose rule is gone, towards a destination that is granted."""
    port = host.port()
    ends = f"endpoints: {{web: '{HOST4}:{port}', out: '0.0.0.0:dynamic'}}\n"
    rules = f"egress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
    with contextlib.closing(host.client.listener()) as far:
        steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 80, "wait", "connect", CLIENT4, far.getsockname()[1], "wait"]
        one = confine(host, transport, f"name: t\n{ends}ingress: [{{bind: '*:80', endpoint: web}}]\n{rules}", *steps)
        assert one.lines(2)[-1] == "bind ok"
        apply(host, one, folder, f"name: t\n{ends}{rules}")
        one.resume()
        return one.lines(3)[-1]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_socket_bound_to_an_endpoint_that_is_gone_connects_from_it_no_more(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    assert connects_from_a_lost_endpoint(host, confine, tmp_path, transport) == "connect EACCES"


def test_control_where_nobody_looks_at_that_it_connects(without: Without, confine: Confine, tmp_path: Path) -> None:
    assert connects_from_a_lost_endpoint(without("lost"), confine, tmp_path, "direct") == "connect ok"


def heard_before_and_after(host: Host, confine: Confine, folder: Path, transport: str) -> list[str]:
    """What a datagram socket at an endpoint hears of a stranger: while it has its rule, and without it."""
    text = "name: t\ningress: [{}]\ndefault: deny\n"
    rule, port = "{bind: '*:53', endpoint: dns}", host.port()
    steps = ["make", 2, 2, 0, "bind", "0.0.0.0", 53, "wait", "receive", "wait", "receive", "wait"]
    host.graft("ep", "add", "dns", f"0.0.0.0:{port}")
    one = confine(host, transport, text.format(rule), *steps)
    one.lines(2)
    for lines, rules in ((3, rule), (4, "")):
        apply(host, one, folder, text.format(rules))
        with datagrams(host) as client:
            client.sendto(b"stranger", (HOST4, port))
        one.resume()
        said = one.lines(lines)
    return said[2:]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_datagram_socket_that_was_heard_is_deaf_when_its_rule_is_gone(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    assert heard_before_and_after(host, confine, tmp_path, transport) == ["receive stranger", "receive none"]


def test_control_where_a_rule_that_was_found_stays_it_hears(without: Without, confine: Confine, tmp_path: Path) -> None:
    heard = heard_before_and_after(without("number of the ruleset"), confine, tmp_path, "direct")
    assert heard == ["receive stranger", "receive stranger"]


def hears_at_what_it_let_go(host: Host, confine: Confine, folder: Path) -> list[str]:
    """What it says of a send from a port that it has let go of, taken again, and of a stranger's datagram there."""
    text = "name: t\nendpoints: {{dns: '0.0.0.0:dynamic'}}\ningress: [{}]\ndefault: deny\n"
    steps = ["make", 2, 2, 0, "bind", "0.0.0.0", 53, "wait", "unspec", "range", "-", "-", "send", CLIENT4, 9]
    one = confine(host, "direct", text.format("{bind: '*:53', endpoint: dns}"), *steps, "wait", "receive", "wait")
    one.lines(2)
    port = int(re.findall(r":(\d+) ", host.netns.run("ss", "-Hlun"))[-1])
    apply(host, one, folder, text.format(""))
    one.resume()
    one.lines(3)
    assert str(port) not in host.netns.run("ss", "-Haun")  # it has let go
    one.program.tell(f"{port}\n")
    one.lines(5)
    with datagrams(host) as client:
        client.sendto(b"stranger", (HOST4, port))
    one.resume()
    return one.lines(6)[4:]


def test_a_datagram_socket_does_not_get_a_port_back_that_it_let_go(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    assert hears_at_what_it_let_go(host, confine, tmp_path) == ["send EACCES", "receive none"]


def test_control_without_a_look_at_packets_it_gets_it_back(without: Without, confine: Confine, tmp_path: Path) -> None:
    assert hears_at_what_it_let_go(without("packets in"), confine, tmp_path) == ["send EACCES", "receive stranger"]


# ---- after the container ---------------------------------------------------------------------------------------------


def is_heard_when_it_comes_out(host: Host, confine: Confine) -> bool:
    """Whether a listener is reached that lay in a message between two unix sockets when its container was detached."""
    port = host.port()
    text = f"name: t\nendpoints: {{web: 0.0.0.0:{port}}}\ningress: [{{bind: '*:80', endpoint: web}}]\ndefault: deny\n"
    steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 80, "listen", "hide", "wait", "unhide", "wait"]
    one = confine(host, "swap", text, *steps)
    assert one.lines(4)[-1] == "hide ok"
    host.remove(host.container(one.program))  # the rules, and no look for sockets
    return reaches(host, HOST4, port)


def test_a_listener_hears_nobody_when_its_container_is_no_more(host: Host, confine: Confine) -> None:
    assert not is_heard_when_it_comes_out(host, confine)


def test_control_where_the_dead_have_listeners_it_is_heard(without: Without, confine: Confine) -> None:
    assert is_heard_when_it_comes_out(without("dead"), confine)


def hears_ipv4(host: Host, confine: Confine) -> str:
    """What a datagram socket of an IPv6 endpoint says of IPv4, when it has let go of its port and got it back."""
    text = "name: t\nendpoints: {six: '[::]:dynamic'}\ningress: [{bind: '*:53', endpoint: six}]\ndefault: deny\n"
    steps = ["make", 10, 2, 0, "option", SOL_IPV6, 26, "bind", "::", 53, "wait", "unspec"]
    steps += ["bytes", SOL_IPV6, 26, "00000000", "range", "-", "-", "send", CLIENT6, 9, "wait", "receive", "wait"]
    one = confine(host, "direct", text, *steps)
    assert one.lines(3)[-1] == "bind ok"
    port = int(re.findall(r"\]:(\d+) ", host.netns.run("ss", "-Hlun"))[-1])
    one.resume()
    one.program.tell(f"{port}\n")
    assert one.lines(7)[-1] == "send EACCES"
    with datagrams(host) as client:
        client.sendto(b"stranger", (HOST4, port))
    one.resume()
    return one.lines(8)[-1]


def test_a_datagram_socket_of_an_ipv6_endpoint_hears_no_ipv4_after_a_disconnect(host: Host, confine: Confine) -> None:
    assert hears_ipv4(host, confine) == "receive none"


def test_control_where_nobody_looks_at_the_family_it_hears(without: Without, confine: Confine) -> None:
    assert hears_ipv4(without("ipv4"), confine) == "receive stranger"


@contextlib.contextmanager
def held_socket(one: Confined) -> Iterator[socket.socket]:
    """A copy of the one socket of its program."""
    [pid] = cgroup.processes(one.cgroup)
    [fd] = [int(link.name) for link in Path(f"/proc/{pid}/fd").iterdir() if "socket:" in str(link.readlink())]
    process = os.pidfd_open(pid)
    sock = socket.socket(fileno=pidfd_getfd(process, fd))
    os.close(process)
    with contextlib.closing(sock):
        yield sock


def hears_for_the_dead(host: Host, confine: Confine) -> bool:
    """Whether who was handed a listener is reached when its container has ended, and nobody closed it."""
    port = host.port()
    text = f"name: t\nendpoints: {{web: 0.0.0.0:{port}}}\ningress: [{{bind: '*:80', endpoint: web}}]\ndefault: deny\n"
    steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 80, "listen", "wait"]
    one = confine(host, "swap", text, *steps, defence="leftovers")
    one.lines(3)
    # As a process outside that the program hands its socket to.
    with held_socket(one) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        one.program.stop()
        return reaches(host, HOST4, port)


def test_who_was_handed_a_listener_hears_nobody_when_its_container_has_ended(host: Host, confine: Confine) -> None:
    assert not hears_for_the_dead(host, confine)


def test_control_where_the_dead_have_listeners_it_hears(without: Without, confine: Confine) -> None:
    assert hears_for_the_dead(without("dead"), confine)
