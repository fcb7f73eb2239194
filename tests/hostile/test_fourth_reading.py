"""What a fourth reading found: where a connected datagram socket really sends, what an image says of its engine."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.hostile.conftest import Confine, Without
from tests.hostile.test_afterwards import apply
from tests.hostile.test_datagrams import came, datagrams
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4

pytestmark = pytest.mark.e2e

OTHER4 = "10.98.0.77"
INET, DGRAM = 2, 2
SOL_UDP, UDP_CORK = socket.IPPROTO_UDP, 1

# ---- IPv4 sends of a connected socket go where its last datagram went that one send began and another completed ----


def policy(*to: str) -> str:
    rules = ", ".join(f"{{to: {one}, endpoint: out}}" for one in to)
    return f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\negress: [{rules}]\ndefault: deny\n"


def strays(host: Host, confine: Confine, folder: Path) -> list[str | None]:
    """Who sends to a destination before, and after its rule is gone, by a socket that is connected to another one."""
    host.client.run("ip", "address", "replace", f"{OTHER4}/24", "dev", "eth0")
    with datagrams(host, OTHER4) as gone, datagrams(host) as peer:
        steps = ["make", INET, DGRAM, 0, "connect", CLIENT4, peer.getsockname()[1]]
        steps += ["option", SOL_UDP, UDP_CORK, "send", OTHER4, gone.getsockname()[1]]
        steps += ["bytes", SOL_UDP, UDP_CORK, "00000000", "wait", "send", "-", "-", "wait"]
        one = confine(host, "direct", policy(CLIENT4, OTHER4), *steps)
        assert one.lines(5)[2:] == ["option ok", "send ok", "bytes ok"]
        before = came(gone, 10)
        apply(host, one, folder, policy(CLIENT4))
        one.goes_on()
        one.lines(6)
        return [before, came(gone)]


def test_a_connected_socket_sends_to_no_destination_that_lost_its_rule(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    before, after = strays(host, confine, tmp_path)
    assert before is not None
    assert after is None


def test_control_where_only_its_peer_is_judged_it_does(without: Without, confine: Confine, tmp_path: Path) -> None:
    assert None not in strays(without("kept flow"), confine, tmp_path)
