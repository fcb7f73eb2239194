"""A program that gets one port of a range cannot take the next one, which no request of its own becomes.

The rule maps 5000-5003 to the range, but for 5001, which a smaller rule maps elsewhere: the range's second port is
granted to nobody.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.e2e.test_enforcement import flipped, listening_ports
from tests.hostile.conftest import TRANSPORTS, Confine, Confined, Without
from tests.hostile.test_listeners import LISTEN, is_reached, knock, listens_at
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.shell import Word

pytestmark = pytest.mark.e2e

_ranges = itertools.count(41000, 4)  # where the kernel picks ports too (net.ipv4.ip_local_port_range)


def policy(host: Host) -> tuple[str, int]:
    """The rules, and the first port of the range."""
    first = next(_ranges)
    return policy_text(first, host.port()), first


def policy_text(first: int, elsewhere: int, shift: int = 0) -> str:
    return (
        f"name: t\nendpoints: {{rtp: '0.0.0.0:{first}-{first + 3}', other: 0.0.0.0:{elsewhere}}}\n"
        f"ingress:\n  - {{bind: '*:{5000 + shift}-{5003 + shift}', endpoint: rtp}}\n"
        f"  - {{bind: '*:5001', endpoint: other}}\ndefault: deny\n"
    )


def only(port: int) -> list[Word]:
    """Lets the kernel pick no other port, by a call that no hook sees (IP_LOCAL_PORT_RANGE, kernel 6.3)."""
    return ["range", port, port]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("call", ["bind", "bind32", "bindu"])
def test_no_bind_gets_the_next_port(host: Host, confine: Confine, transport: str, call: str) -> None:
    """By its own number, as an address of its own, by the port that has another rule, and after its neighbour."""
    text, first = policy(host)
    asked = [("0.0.0.0", first + 1), ("127.0.0.1", first + 1), (HOST4, first + 1), ("0.0.0.0", 5001), ("0.0.0.0", 0)]
    steps: list[Word] = ["make", 2, 1, 0, "bind", "0.0.0.0", 5000, "listen"]
    for address, port in asked:
        steps += ["make", 2, 1, 0, call, address, port, LISTEN[transport]]
    one = confine(host, transport, text, *steps, "wait")
    one.lines(3 + 3 * len(asked))
    assert is_reached(host, first)
    assert not is_reached(host, first + 1)


def accepted_once(host: Host, confine: Confine, transport: str) -> tuple[Confined, int]:
    """A connection that was accepted at the first port gives it up, and listens where the kernel has no choice."""
    text, first = policy(host)
    steps: list[Word] = ["make", 2, 1, 0, "bind", "0.0.0.0", 5000, "listen", "accept", "unspec", *only(first + 1)]
    one = confine(host, transport, text, *steps, LISTEN[transport], "name", "wait")
    one.lines(3)
    knock(host, first)
    one.lines(8)
    return one, first


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_accepted_connection_does_not_listen_at_the_next_port(host: Host, confine: Confine, transport: str) -> None:
    one, first = accepted_once(host, confine, transport)
    assert listens_at(one, 8) == first + 1
    assert not is_reached(host, first + 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_every_port_of_the_range_is_its_own_it_does(
    without: Without, confine: Confine, transport: str
) -> None:
    host = without("port by port")
    one, first = accepted_once(host, confine, transport)
    assert listens_at(one, 8) == first + 1
    assert is_reached(host, first + 1)


def failed_once(host: Host, confine: Confine, transport: str) -> tuple[Confined, int]:
    """A bind to a port that is in use has left its endpoint in the tag; then it listens where the kernel must pick."""
    text, first = policy(host)
    steps: list[Word] = ["make", 2, 1, 0, "bind", "0.0.0.0", 5000, "listen", "make", 2, 1, 0, "bind32", "0.0.0.0", 5000]
    one = confine(host, transport, text, *steps, *only(first + 1), LISTEN[transport], "name", "wait")
    one.lines(8)
    return one, first


def test_a_bind_that_failed_does_not_listen_at_the_next_port(host: Host, confine: Confine) -> None:
    one, first = failed_once(host, confine, "direct")
    assert "bind32 EADDRINUSE" in one.lines(8) and listens_at(one, 8) == first + 1
    assert not is_reached(host, first + 1)


def shifted(host: Host, confine: Confine, transport: str, tmp_path: Path) -> tuple[Confined, int]:
    """Bound to what 5002 became, a socket listens when that is what 5001 became before, and 5003 becomes now."""
    first, elsewhere = next(_ranges), host.port()
    steps: list[Word] = ["make", 2, 1, 0, "bind", "0.0.0.0", 5002, "wait", LISTEN[transport], "wait"]
    one = confine(host, transport, policy_text(first, elsewhere), *steps)
    one.lines(2)
    (tmp_path / "shifted.yaml").write_text(policy_text(first, elsewhere, 1))
    host.graft("policy", "apply", tmp_path / "shifted.yaml", "--cgroup", one.cgroup)
    one.resume()
    assert one.lines(3)[-1] == f"{LISTEN[transport]} ok"
    return one, first


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_port_that_another_request_becomes_now_is_not_listened_at(
    host: Host, confine: Confine, transport: str, tmp_path: Path
) -> None:
    _, first = shifted(host, confine, transport, tmp_path)
    assert not is_reached(host, first + 2)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_every_port_of_the_range_is_its_own_it_is(
    without: Without, confine: Confine, transport: str, tmp_path: Path
) -> None:
    host = without("port by port")
    _, first = shifted(host, confine, transport, tmp_path)
    assert is_reached(host, first + 2)


def rebound(host: Host, confine: Confine, transport: str) -> tuple[Confined, int]:
    """A second bind asks for 5002 while the socket has the first port; then it listens."""
    text, first = policy(host)
    steps: list[Word] = ["make", 2, 1, 0, "bind", "0.0.0.0", 5000, "bind32", "0.0.0.0", 5001, "listen", "name", "wait"]
    return confine(host, transport, text, *steps), first


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_second_bind_changes_neither_the_port_nor_what_is_granted(
    host: Host, confine: Confine, transport: str
) -> None:
    one, first = rebound(host, confine, transport)
    assert one.lines(5)[1:] == ["bind ok", "bind32 EINVAL", "listen ok", "name 0.0.0.0 5000"]
    assert is_reached(host, first) and not is_reached(host, first + 1)


def test_an_address_that_flips_during_the_bind_gets_what_each_of_its_requests_becomes(
    host: Host, programs: Programs
) -> None:
    """Between 5000, which becomes the first port, and the number of the second port itself, which no rule names."""
    first = next(_ranges)
    rules = ["-i", f"*:5000-5003={host.endpoint(f'0.0.0.0:{first}-{first + 3}')}"]
    rules += ["-i", f"*:5001={host.endpoint(f'0.0.0.0:{host.port()}')}"]
    words: list[Word] = [programs["flip"], "bind", 2000, "0.0.0.0", 5000, "0.0.0.0", first + 1]
    program = host.start(*rules, "--", *words, talk=True)
    flipped(host, program)
    found = listening_ports(host)
    assert first in found and not {first + 1, first + 2, first + 3} & set(found)
