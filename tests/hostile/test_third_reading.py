"""What a third reading found: the host's own firewall, its flow labels, its links, its sources, its processes."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graft.errors import RefusedError
from graft.oci import shim
from graft.oci.state import State
from tests.hostile.conftest import TRANSPORTS, Confine, Without
from tests.hostile.test_afterwards import OTHER4
from tests.hostile.test_datagrams import came, datagrams
from tests.hostile.undefended import COMMAND
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4
from tests.support.shell import run

pytestmark = pytest.mark.e2e

NOBODY = 65534
OTHER6 = "fd98::79"
IP_PKTINFO, IPV6_FLOWLABEL_MGR, IPV6_FLOWINFO_SEND, IPV6_PKTINFO = 8, 32, 33, 50
INET, INET6, STREAM, DGRAM = 2, 10, 1, 2


def policy(to: str, source: str = "0.0.0.0:dynamic", more: str = "") -> str:
    return f"name: t\nendpoints: {{out: '{source}'}}\n{more}egress: [{{to: '{to}', endpoint: out}}]\ndefault: deny\n"


# ---- the host's firewall: whose socket is it? -----------------------------------------------------------------------

CONNECTS = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])))
    print("connected")
except ConnectionRefusedError:
    print("refused")
"""


@contextlib.contextmanager
def nobody_is_refused(host: Host, folder: Path) -> Iterator[list[str]]:
    """A rule of the operator's own for what a user sends; gives what runs a program of that user's."""
    file = folder / "users.nft"
    rule = f"meta skuid {NOBODY} meta l4proto tcp reject with tcp reset"
    file.write_text(f"table inet users {{\n chain c {{\n  type filter hook output priority 0;\n  {rule}\n }}\n}}\n")
    host.netns.run("nft", "-f", file)
    try:
        with contextlib.closing(host.client.listener()) as far:
            rules = ["-e", f"{CLIENT4}={host.endpoint('0.0.0.0:dynamic')}", "--user", "nobody"]
            program = ["/usr/bin/python3", "-ISc", CONNECTS, CLIENT4, str(far.getsockname()[1])]
            yield ["run", *rules, "--", *program]
    finally:
        host.netns.run("nft", "delete", "table", "inet", "users")


def test_a_rule_of_the_firewalls_for_the_programs_user_holds_for_its_twins(host: Host, tmp_path: Path) -> None:
    with nobody_is_refused(host, tmp_path) as words:
        assert host.graft(*words).stdout == "refused\n"


def test_control_a_twin_that_root_made_passes_for_roots(host: Host, tmp_path: Path) -> None:
    with nobody_is_refused(host, tmp_path) as words:
        command = [sys.executable, str(COMMAND), "opener", *words]
        assert run(command, environment=host.environment, status=0).stdout == "connected\n"


# ---- flow labels of IPv6: one that is leased exclusively takes all others from everybody ----------------------------


def lease(host: Host, confine: Confine, transport: str) -> list[str]:
    """What a program says that leases a flow label on the host's stack for itself alone."""
    label = struct.pack("!I", 0x10 + TRANSPORTS.index(transport))
    wanted = struct.pack("=16s4sBBHHHI", socket.inet_pton(INET6, CLIENT6), label, 0, 1, 3, 6, 6, 0)
    with contextlib.closing(host.client.listener(CLIENT6)) as far:
        steps = ["make", INET6, STREAM, 0, "connect", CLIENT6, far.getsockname()[1]]
        steps += ["bytes", 41, IPV6_FLOWLABEL_MGR, wanted.hex(), "wait"]
        return confine(host, transport, policy(CLIENT6, "[::]:dynamic"), *steps).lines(3)


def others_may_label(host: Host) -> bool:
    """Whether anybody else on the host may send with a flow label of its own choice."""
    with host.netns.inside():
        other = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with contextlib.closing(other), contextlib.suppress(OSError):
        other.setsockopt(socket.IPPROTO_IPV6, IPV6_FLOWINFO_SEND, 1)
        return other.sendto(b"x", (CLIENT6, 9, 0x54321, 0)) == 1
    return False


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_flow_labels_are_not_taken_from_the_host(host: Host, confine: Confine, transport: str) -> None:
    assert lease(host, confine, transport)[-1] == "bytes EPERM"
    assert others_may_label(host)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_nobody_minds_they_are(without: Without, confine: Confine, transport: str) -> None:
    host = without("flow labels")
    assert lease(host, confine, transport)[-1] == "bytes ok"
    assert not others_may_label(host)


# ---- everybody on a link, by multicast ------------------------------------------------------------------------------


@contextlib.contextmanager
def neighbour(host: Host) -> Iterator[socket.socket]:
    with host.client.inside():
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with contextlib.closing(sock):
        sock.bind(("::", 0))
        yield sock


def test_all_neighbours_on_a_link_are_nobodys_without_a_rule_that_names_them(host: Host, confine: Confine) -> None:
    with neighbour(host) as far:
        steps = ["make", INET6, DGRAM, 0, "send", "ff02::1%eth0", far.getsockname()[1], "wait"]
        assert confine(host, "direct", policy("::/0", "[::]:dynamic"), *steps).lines(2)[-1] == "send EACCES"


def test_with_a_rule_that_names_them_they_are_reached(host: Host, confine: Confine) -> None:
    with neighbour(host) as far:
        steps = ["make", INET6, DGRAM, 0, "send", "ff02::1%eth0", far.getsockname()[1], "wait"]
        assert confine(host, "direct", policy("ff02::/16", "[::]:dynamic"), *steps).lines(2)[-1] == "send ok"
        assert str(came(far, 10)).startswith("fe80:")


# ---- a source that a control message names, where the endpoint has no address ---------------------------------------


def info4(address: str) -> list[object]:
    return ["cmsg", 0, IP_PKTINFO, struct.pack("=i4s4s", 0, socket.inet_aton(address), bytes(4)).hex()]


def source_seen(host: Host, confine: Confine, connected: bool) -> str | None:
    """Where a datagram comes from that is sent by way of `0.0.0.0:dynamic`, and names another address of the host's."""
    host.netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    with datagrams(host) as far:
        port = far.getsockname()[1]
        steps = ["make", INET, DGRAM, 0, *(["connect", CLIENT4, port] if connected else [])]
        to = ["-", "-"] if connected else [CLIENT4, port]
        assert confine(host, "direct", policy(CLIENT4), *steps, *info4(OTHER4), *to, "wait").lines(2)
        return came(far, 10)


@pytest.mark.parametrize("connected", [False, True])
def test_the_kernel_picks_the_source_where_the_endpoint_has_none(host: Host, confine: Confine, connected: bool) -> None:
    assert source_seen(host, confine, connected) == HOST4


@pytest.mark.parametrize("connected", [False, True])
def test_control_where_a_datagram_may_name_it_it_does(without: Without, confine: Confine, connected: bool) -> None:
    assert source_seen(without("source"), confine, connected) == OTHER4


@pytest.mark.parametrize("connected", [False, True])
def test_the_kernel_picks_the_source_of_ipv6_too(host: Host, confine: Confine, connected: bool) -> None:
    host.netns.run("ip", "address", "replace", f"{OTHER6}/128", "dev", "lo")
    where = struct.pack("=16si", socket.inet_pton(INET6, OTHER6), 0).hex()
    with datagrams(host, CLIENT6) as far:
        port = far.getsockname()[1]
        steps = ["make", INET6, DGRAM, 0, *(["connect", CLIENT6, port] if connected else [])]
        steps += ["cmsg", 41, IPV6_PKTINFO, where, *(["-", "-"] if connected else [CLIENT6, port]), "wait"]
        confine(host, "direct", policy(CLIENT6, "[::]:dynamic"), *steps)
        assert came(far, 10) not in (None, OTHER6)


def test_nobody_passes_for_the_hosts_loopback(host: Host, confine: Confine) -> None:
    with host.netns.inside():
        service = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.closing(service):
        service.bind((HOST4, 0))
        steps = ["make", INET, DGRAM, 0, *info4("127.0.0.1"), HOST4, service.getsockname()[1], "wait"]
        confine(host, "direct", policy("0.0.0.0/0"), *steps)
        assert came(service, 10) == HOST4


def test_a_server_at_an_endpoint_of_every_address_answers_from_the_one_that_was_asked(
    host: Host, confine: Confine
) -> None:
    host.netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    port = host.port()
    more = "ingress: [{bind: '*:53', endpoint: dns}]\n"
    text = policy(CLIENT4, more=more).replace("{out:", f"{{dns: '0.0.0.0:{port}', out:")
    with datagrams(host) as far:
        steps = ["make", INET, DGRAM, 0, "bind", "0.0.0.0", 53, "wait", "receive", *info4(OTHER4), CLIENT4]
        one = confine(host, "direct", text, *steps, far.getsockname()[1], "wait")
        assert one.lines(2)[1] == "bind ok"
        far.sendto(b"asked", (OTHER4, port))
        one.resume()
        assert one.lines(4)[3] == "cmsg ok"
        assert came(far, 10) == OTHER4


# ---- supervisors: one for each process that an engine's exec leaves behind ------------------------------------------


def test_a_container_has_so_many_supervisors_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listeners: list[int] = []

    class Keeper:
        def __init__(self, *arguments: Any) -> None:
            listeners.append(arguments[2])

        def start(self) -> None: ...

        def reap(self) -> bool:
            return False

    monkeypatch.setattr(shim, "Keeper", Keeper)
    rules = SimpleNamespace(bears_datagrams=False)
    graft = SimpleNamespace(compile=lambda _policy: rules)
    plan = SimpleNamespace(killable=False, id="image", settings=None, policy=None, datagrams=False)
    attachment = shim.Attachment(plan, graft)  # type: ignore[arg-type]
    attachment.container = SimpleNamespace(killable=False, cgroup_path=tmp_path)  # type: ignore[assignment]
    try:
        with pytest.raises(RefusedError, match="supervisors"):
            for _ in range(1000):
                attachment.start_supervisor(State("image", 0), os.open(os.devnull, os.O_RDONLY))
        assert 1 < len(listeners) < 100
    finally:
        for fd in listeners:
            os.close(fd)
