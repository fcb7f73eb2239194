"""What a thirty-fifth reading found: root of an endpoint's namespace had every command wait, and every policy refused,
by the addresses that it has there: all of them were read at each policy that was put into force, and what it had at
one `ep set` stayed noted beside what it had at the next one, until the table was full. And a rule for one port of a
broadcast address granted all others of it, by a wider rule.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from graft.kernel import netns
from graft.kernel.routes import local_routes
from graft.state import host_addresses
from tests.hostile.conftest import TRANSPORTS, Confine, graft_without
from tests.hostile.test_thirty_first_reading import BROADCAST, EVERYWHERE, granting, sent_to_all, service
from tests.support.installation import Host
from tests.support.shell import AS_NOBODY, run

pytestmark = pytest.mark.e2e

MOST = host_addresses._MOST_OF_OTHERS
ROUNDS = 3

TENANT = r"""
import socket, struct, sys
ctl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
ctl.send(struct.pack("=IHHIIBBHiII", 32, 16, 5, 0, 0, 0, 0, 0, 1, 1, 1)); ctl.recv(65536)  # lo up
def route(kind, flags, number):  # 10.x.y.z, local, in the table local, on lo
    return struct.pack("=IHHII8BIHH4sHHI", 44, kind, flags, 0, 0, 2, 32, 0, 0, 255, 3, 254, 2, 0, 8, 1,
                       struct.pack("!I", (10 << 24) + number), 8, 4, 1)
print("ready", flush=True)
for line in sys.stdin:
    what, first, count = line.split()
    kind, flags = (24, 0x401) if what == "add" else (25, 1)
    for at in range(int(first), int(first) + int(count), 500):
        ctl.send(b"".join(route(kind, flags, number) for number in range(at, at + 500)))
    print("done", flush=True)
"""
"""Root of a user and a network namespace of its own: nobody on the host."""


class Tenant:
    """Such a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.pid, self._input, self._output = process.pid, process.stdin, process.stdout
        assert self._output.readline() == "ready\n"

    def does(self, what: str, first: int, count: int) -> None:
        self._input.write(f"{what} {first} {count}\n")
        self._input.flush()
        assert self._output.readline() == "done\n"


@pytest.fixture
def tenant() -> Iterator[Tenant]:
    command = [*map(str, AS_NOBODY), "unshare", "--map-root-user", "--net", "/usr/bin/python3", "-ISc", TENANT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Tenant(process)
        finally:
            process.kill()


def noted(host: Host, tenant: Tenant) -> int:
    """How many of its addresses are noted."""
    cookie = netns.cookie(tenant.pid)
    return sum(key.netns == cookie for key in host.maps.noted_addresses.keys())  # noqa: SIM118


@pytest.mark.parametrize("without", ["", "bounded addresses"], ids=["", "control"])
def test_a_namespace_fills_no_table_by_other_addresses_each_time(host: Host, tenant: Tenant, without: str) -> None:
    command = graft_without(without)
    for number in range(ROUNDS):
        tenant.does("add", number * MOST, MOST)
        words = ["ep", "set" if number else "add", "there", f"10.0.0.1:{host.port()}", "--netns", tenant.pid]
        run([*command, *words], environment=host.environment, status=0, timeout=60)
        tenant.does("remove", number * MOST, MOST)
    assert (noted(host, tenant) > 2 * MOST) is bool(without)


def test_no_more_of_a_namespace_is_read_than_counts(tenant: Tenant) -> None:
    tenant.does("add", 0, 10 * MOST)
    with netns.entered(tenant.pid):
        assert len(local_routes().addresses) >= 10 * MOST  # a control
        assert MOST <= len(local_routes(MOST).addresses) <= 2 * MOST


# ---- a rule for one port of a broadcast address opened all others of it, by a wider rule


@pytest.mark.parametrize("own", ["action: deny", "endpoint: out"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rule_for_a_port_of_a_broadcast_address_grants_no_other(
    host: Host, confine: Confine, transport: str, own: str
) -> None:
    rule = f"{{to: {BROADCAST}, ports: [137], {own}}}"
    assert sent_to_all(host, confine, transport, *EVERYWHERE, rule) == ("send EACCES", False)


def test_explain_says_so(host: Host, confine: Confine) -> None:
    with service(host):
        one = confine(
            host, "direct", granting(*EVERYWHERE, f"{{to: {BROADCAST}, ports: [137], endpoint: out}}"), "wait"
        )
        explain = ("explain", one.cgroup, "connect", "--proto", "udp")
        assert "refused" in host.graft(*explain, f"{BROADCAST}:9", status=None).stdout
        assert "refused" not in host.graft(*explain, f"{BROADCAST}:137", status=None).stdout
