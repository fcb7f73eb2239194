"""A container's listener in the host's stack is reached only at an endpoint that is granted at that moment."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Confined, Without
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

# A call that the filter of transport swap does not trap; direct has no filter.
LISTEN = {"swap": "listen32", "born": "listen", "direct": "listen"}


def policy(port: int, rule: bool = True) -> str:
    ingress = "[{bind: '*:80', endpoint: web}]" if rule else "[]"
    return f"name: t\nendpoints: {{web: 0.0.0.0:{port}}}\ningress: {ingress}\ndefault: deny\n"


def is_reached(host: Host, port: int) -> bool:
    """Whether a client on the network gets a connection. A dropped SYN gets no answer at all."""
    return host.client.reaches(HOST4, port, 0.5)


def knock(host: Host, port: int) -> None:
    """Connect to a program that closes the connection at once."""
    with contextlib.suppress(ConnectionResetError):
        host.client.connected(HOST4, port).close()


def listen_again(host: Host, confine: Confine, transport: str, call: str) -> tuple[Confined, int]:
    """A connection that was accepted at the endpoint gives up its port, gets another one and listens."""
    granted = host.port()
    steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 80, "listen", "accept", "unspec", call, "name", "wait"]
    one = confine(host, transport, policy(granted), *steps)
    one.lines(3)
    knock(host, granted)
    return one, listens_at(one, 7)


def listens_at(one: Confined, lines: int) -> int:
    """The port in its last line, which the kernel has chosen."""
    return int(one.lines(lines)[-1].split()[-1])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_accepted_connection_listens_on_no_other_port(host: Host, confine: Confine, transport: str) -> None:
    one, other = listen_again(host, confine, transport, LISTEN[transport])
    assert one.lines(7)[-2] == f"{LISTEN[transport]} ok"  # no hook can refuse it
    assert not is_reached(host, other)


def test_the_supervisor_refuses_an_accepted_connection_to_listen(host: Host, confine: Confine) -> None:
    one, _ = listen_again(host, confine, "swap", "listen")
    assert one.lines(7)[-2] == "listen EACCES"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_one_bind_counts_for_ever_it_is_reached(
    without: Without, confine: Confine, transport: str
) -> None:
    host = without("bound")
    one, other = listen_again(host, confine, transport, "listen")
    assert one.lines(7)[-2] == "listen ok"
    assert is_reached(host, other)


def bound_before(host: Host, confine: Confine, transport: str, call: str, *between: str) -> tuple[Confined, int]:
    port = host.port()
    steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 80, *between, "wait", call, "wait"]
    return confine(host, transport, policy(port), *steps), port


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("between", [(), ("listen", "shutdown")], ids=["bound", "listened"])
def test_a_listener_is_not_reached_where_its_rule_is_removed(
    host: Host, confine: Confine, tmp_path: Path, transport: str, between: tuple[str, ...]
) -> None:
    call = LISTEN[transport]
    one, port = bound_before(host, confine, transport, call, *between)
    one.lines(2 + len(between))
    (tmp_path / "none.yaml").write_text(policy(port, rule=False))
    host.graft("policy", "apply", tmp_path / "none.yaml", "--cgroup", one.cgroup)
    one.resume()
    assert one.lines(3 + len(between))[-1] == f"{call} ok"
    assert not is_reached(host, port)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_listener_is_not_reached_at_a_deleted_endpoint(host: Host, confine: Confine, transport: str) -> None:
    call = LISTEN[transport]
    one, port = bound_before(host, confine, transport, call)
    one.lines(2)
    host.graft("ep", "del", "web", "--force")
    one.resume()
    assert one.lines(3)[-1] == f"{call} ok"
    assert not is_reached(host, port)


def test_the_supervisor_refuses_to_listen_at_a_deleted_endpoint(host: Host, confine: Confine) -> None:
    one, _ = bound_before(host, confine, "swap", "listen")
    one.lines(2)
    host.graft("ep", "del", "web", "--force")
    one.resume()
    assert one.lines(3)[-1] == "listen EACCES"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_one_bind_counts_for_ever_a_removed_rule_serves(
    without: Without, confine: Confine, transport: str
) -> None:
    host = without("bound")
    one, port = bound_before(host, confine, transport, "listen")
    one.lines(2)
    host.graft("ep", "del", "web", "--force")
    one.resume()
    assert one.lines(3)[-1] == "listen ok"
    assert is_reached(host, port)


def link_local_of(host: Host) -> str:
    """The client's own link-local address."""

    def found() -> str:
        shown = host.client.run("ip", "-6", "-br", "address", "show", "dev", "eth0", "scope", "link", "-tentative")
        return next((word.split("/")[0] for word in shown.split() if word.startswith("fe80:")), "")

    return until("a link-local address", found)


def tied(host: Host, confine: Confine, transport: str, rules: str) -> tuple[Confined, int]:
    """A socket that a failed connect has tied to an interface listens."""
    far = link_local_of(host)
    with host.netns.inside():
        interface = socket.if_nametoindex("eth0")
    steps = ["make", 10, 1, 0, "connect", f"{far}%{interface}", 9, LISTEN[transport], "name", "wait"]
    text = f"name: t\nendpoints: {{out: '[::]:dynamic'}}\negress: [{rules}]\ndefault: deny\n"
    one = confine(host, transport, text, *steps)
    return one, listens_at(one, 4)


def is_reached_over_link_local(host: Host, port: int) -> bool:
    far = host.netns.run("ip", "-6", "-br", "address", "show", "dev", "eth0", "scope", "link").split()[2].split("/")[0]
    with host.client.inside():
        scope = socket.if_nametoindex("eth0")
        sock = socket.socket(socket.AF_INET6)
    sock.settimeout(0.5 * PATIENCE)
    try:
        sock.connect((far, port, 0, scope))
    except OSError:
        return False
    finally:
        sock.close()
    return True


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_link_local_destinations_need_a_rule_that_names_them(host: Host, confine: Confine, transport: str) -> None:
    one, _ = tied(host, confine, transport, "{to: '::/0', endpoint: out}")
    assert one.lines(2)[1] == "connect EACCES"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_listener_that_is_tied_to_an_interface_is_not_reached(host: Host, confine: Confine, transport: str) -> None:
    one, port = tied(host, confine, transport, "{to: 'fe80::/10', endpoint: out}")
    assert one.lines(4)[:3] == ["make ok", "connect ECONNREFUSED", f"{LISTEN[transport]} ok"]
    assert not is_reached_over_link_local(host, port)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_without_the_packet_hook_it_is_reached(without: Without, confine: Confine, transport: str) -> None:
    host = without("packets in")
    one, port = tied(host, confine, transport, "{to: 'fe80::/10', endpoint: out}")
    assert one.lines(4)[1:3] == ["connect ECONNREFUSED", f"{LISTEN[transport]} ok"]
    assert is_reached_over_link_local(host, port)


def without_memory(host: Host, confine: Confine) -> tuple[Confined, int]:
    one = confine(host, "direct", policy(host.port()), "make", 2, 1, 0, "fill", "listen", "name", "wait")
    return one, listens_at(one, 4)


def test_a_listener_without_memory_for_its_tag_is_not_reached(host: Host, confine: Confine) -> None:
    one, port = without_memory(host, confine)
    assert one.lines(4)[1:3] == ["fill ok", "listen ok"]
    assert not is_reached(host, port)


def test_control_where_missing_memory_does_not_refuse_it_is_reached(without: Without, confine: Confine) -> None:
    host = without("memory")
    one, port = without_memory(host, confine)
    assert one.lines(4)[1:3] == ["fill ok", "listen ok"]
    assert is_reached(host, port)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_second_bind_is_the_kernels_einval_and_changes_nothing(host: Host, confine: Confine, transport: str) -> None:
    text = f"name: t\nendpoints: {{web: 0.0.0.0:{host.port()}}}\ningress: [{{bind: '*:80-90', endpoint: web}}]\n"
    steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 80, "bind", "127.0.0.1", 81, "name", "wait"]
    one = confine(host, transport, text, *steps)
    assert one.lines(4)[1:] == ["bind ok", "bind EINVAL", "name 0.0.0.0 80"]


def test_control_a_second_bind_that_is_recorded_changes_the_name(without: Without, confine: Confine) -> None:
    host = without("second bind")
    text = f"name: t\nendpoints: {{web: 0.0.0.0:{host.port()}}}\ningress: [{{bind: '*:80-90', endpoint: web}}]\n"
    steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 80, "bind", "127.0.0.1", 81, "name", "wait"]
    one = confine(host, "direct", text, *steps)
    assert one.lines(4)[3] != "name 0.0.0.0 80"


def test_an_accepted_connection_leaves_from_the_rules_endpoint_only(host: Host, confine: Confine) -> None:
    other = "10.98.0.77"
    host.netns.run("ip", "address", "replace", f"{other}/32", "dev", "lo")
    far = host.client.listener()
    granted = host.port()
    text = (
        f"name: t\nendpoints: {{web: '{HOST4}:{granted}', out: '{other}:dynamic'}}\n"
        "ingress: [{bind: '*:80', endpoint: web}]\n"
        f"egress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
    )
    steps = ["make", 2, 1, 0, "bind", "0.0.0.0", 80, "listen", "accept", "unspec"]
    steps += ["connect32", CLIENT4, far.getsockname()[1], "wait"]
    one = confine(host, "swap", text, *map(str, steps))
    one.lines(3)
    knock(host, granted)
    assert one.lines(6)[-1] == "connect32 ok"
    far.settimeout(10 * PATIENCE)
    assert far.accept()[1][0] == other
    far.close()
