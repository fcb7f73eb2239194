"""Sources by a route of the program's own, and tables that one container could fill for all others."""

from __future__ import annotations

import ctypes
import ipaddress
import itertools
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from graft.datapath import layout, rulesets
from graft.errors import RefusedError
from graft.kernel.bpf import Map
from graft.model.endpoint import Endpoint, parse_endpoint
from graft.model.transport import Transport
from graft.oci.request import policy_from_pairs
from graft.policy.model import Origin, Policy, policy_from_flags
from graft.state import container_changes, ferries
from tests.hostile.conftest import TRANSPORTS, Confine, Without
from tests.hostile.test_eleventh_reading import (
    CHOSEN4,
    CHOSEN6,
    DGRAM,
    FAR,
    INET,
    INET6,
    NEAR,
    another_link,
    granting,
    leaves_from,
    number,
)
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4
from tests.support.shell import Word

pytestmark = pytest.mark.e2e

STREAM = 1
SOL_IP, SOL_TCP, SOL_IPV6 = 0, 6, 41
TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE = (SOL_TCP, 30), (SOL_TCP, 34)
ON = "01000000"
_labels = itertools.count(0x12345)

# ---- a source by the way to the first hop ---------------------------------------------------------------------


def packed(address: str) -> str:
    return ipaddress.ip_address(address).packed.hex()


ROUTE: dict[int, tuple[int, int, str]] = {
    # IP_OPTIONS: a loose source route (RFC 791), with an end of the list
    INET: (SOL_IP, 4, f"830704{packed(CHOSEN4)}00"),
    # IPV6_RTHDR: a segment routing header (RFC 8754) of two segments, of which one is left
    INET6: (SOL_IPV6, 57, f"0004040101000000{'00' * 16}{packed(CHOSEN6)}"),
}
"""By which the first hop is an address of the host's own; set by 32-bit calls, which no hook sees."""


def set_route(family: int) -> list[Word]:
    return ["bytes32", *ROUTE[family]]


def clear_route(family: int) -> list[Word]:
    return ["bytes32", *ROUTE[family][:2], ""]


def by_a_route(host: Host, confine: Confine, transport: str) -> str | None:
    with another_link(host):
        calls = [*set_route(INET6), "connect", FAR[INET6], 9, *clear_route(INET6)]
        return leaves_from(host, confine, transport, INET6, granting(FAR[INET6]), *calls)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_program_does_not_choose_its_address_by_a_routing_header(
    host: Host, confine: Confine, transport: str
) -> None:
    assert by_a_route(host, confine, transport) in (NEAR[INET6], None)


def test_control_where_nobody_looks_at_that_it_does(without: Without, confine: Confine) -> None:
    assert by_a_route(without("chosen route"), confine, "born") == CHOSEN6


def connects_from(host: Host, confine: Confine, transport: str, family: int) -> str | None:
    """The source of a connection that is put off until the option is gone; None where there is none."""
    anywhere = "0.0.0.0" if family == INET else "::"
    with another_link(host), closing(host.client.listener(anywhere)) as server:
        to = (FAR[family], server.getsockname()[1])
        steps: list[Word] = ["make", family, STREAM, 0, "bytes", *TCP_FASTOPEN_CONNECT, ON]
        steps += ["bytes", *TCP_FASTOPEN_NO_COOKIE, ON, *set_route(family), "connect", *to, *clear_route(family)]
        steps += ["bytes", SOL_IP, 1, "08000000"]  # IP_TOS: the kernel looks up a route anew
        one = confine(host, transport, granting(FAR[family]), *steps, "send", "-", "-", "name", "wait")
        one.program.until("a send", lambda: "\nsend " in one.program.said)
        server.settimeout(1)
        try:
            connection, peer = server.accept()
        except TimeoutError:
            return None
        connection.close()
        return str(peer[0])


@pytest.mark.parametrize("family", [INET, INET6])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nor_that_of_a_connection_by_a_source_route(host: Host, confine: Confine, transport: str, family: int) -> None:
    assert connects_from(host, confine, transport, family) in (NEAR[family], None)


def test_control_where_nobody_looks_at_the_route_of_a_connection_it_does(without: Without, confine: Confine) -> None:
    """(Over IPv4 this kernel looks up the source again when the SYN leaves.)"""
    assert connects_from(without("chosen route"), confine, "born", INET6) == CHOSEN6


def with_a_flow_label(host: Host, confine: Confine) -> str:
    """What becomes of a connect when the socket has leased a label (IPV6_FLOWLABEL_MGR), which may have a route."""
    lease = packed(CLIENT6) + struct.pack(">IBB", next(_labels), 0, 1).hex() + struct.pack("=HHHI", 1, 0, 0, 0).hex()
    steps: list[Word] = ["make", INET6, DGRAM, 0, "bytes32", SOL_IPV6, 32, lease, "connect", CLIENT6, 9, "wait"]
    lines = confine(host, "born", granting(CLIENT6), *steps).lines(3)
    assert lines[:2] == ["make ok", "bytes32 ok"]
    return lines[2]


def test_a_flow_label_of_its_own_is_a_route_too(host: Host, confine: Confine) -> None:
    assert with_a_flow_label(host, confine) == "connect EACCES"


def test_control_where_nobody_looks_at_the_label_it_connects(without: Without, confine: Confine) -> None:
    assert with_a_flow_label(without("chosen route"), confine) == "connect ok"


def by_an_interface_after_an_endpoints_address(host: Host, confine: Confine, transport: str) -> tuple[str, str]:
    """What becomes of a connect, and the socket's address then, that an endpoint lent it first.

    It has an address, so that the kernel would choose none: but the hook clears that one.
    """
    text = (
        f"name: t\nendpoints: {{lends: '{HOST4}:dynamic', out4: '0.0.0.0:dynamic'}}\n"
        f"egress: [{{to: 10.98.0.9, endpoint: lends}}, {{to: {CLIENT4}, endpoint: out4}}]\ndefault: deny\n"
    )
    with another_link(host) as index:
        steps: list[Word] = ["make", INET, DGRAM, 0, "connect", "10.98.0.9", 9, "unspec"]
        steps += ["bytes32", SOL_IP, 50, number(index, ">"), "connect", CLIENT4, 9, "name", "wait"]
        lines = confine(host, transport, text, *steps).lines(6)
        return lines[4], lines[5].split()[1]


@pytest.mark.parametrize("transport", ["born", "direct"])
def test_an_address_that_is_cleared_is_none(host: Host, confine: Confine, transport: str) -> None:
    assert by_an_interface_after_an_endpoints_address(host, confine, transport) == ("connect EACCES", HOST4)


def test_control_where_it_counts_the_interface_decides(without: Without, confine: Confine) -> None:
    seen = by_an_interface_after_an_endpoints_address(without("cleared address"), confine, "born")
    assert seen == ("connect ok", CHOSEN4)


# ---- the places of ferries ------------------------------------------------------------------------------------

OTHERS = range(1_000_000, 1_000_121)
"""Ids of containers that there are not: as many as filled the table once."""


@contextmanager
def full_ferries(host: Host) -> Iterator[None]:
    """Each of these containers has all of its places, or as many of them as there is room for."""
    maps = host.maps
    keys = [key for container in OTHERS for key in ferries.berth_keys(container)]
    try:
        for key in keys:
            try:
                maps.berths.put(key, layout.BerthValue(family=4))
            except OSError:
                break
        yield
    finally:
        for key in keys:
            maps.berths.delete(key)


def sends_inside(host: Host, confine: Confine) -> str:
    steps: list[Word] = ["make", INET, DGRAM, 0, "send", "127.0.0.1", 53, "wait"]
    return confine(host, "swap", granting(CLIENT4).replace("default: deny\n", ""), *steps).lines(2)[1]


def test_other_containers_take_no_place_of_this_ones_ferry(host: Host, confine: Confine) -> None:
    with full_ferries(host):
        assert sends_inside(host, confine) == "send ok"


def test_control_where_there_are_32768_for_all_they_do(without: Without, confine: Confine) -> None:
    host = without("berths")
    with full_ferries(host):
        assert sends_inside(host, confine) == "send ENOBUFS"


def test_there_are_no_more_ferries_than_places_for_them(host: Host, confine: Confine) -> None:
    """A container that comes too late keeps its datagrams inside."""
    maps = host.maps
    taken = []
    try:
        for container in itertools.count(1_000_000):
            try:
                maps.ferries.put(ctypes.c_uint32(container), layout.FerryValue(mark=1))
            except OSError:
                break
            taken.append(container)
        assert len(maps.ferries.keys()) * (layout.BERTHS4 + layout.BERTHS6) <= layout.MAX_BERTHS
        assert sends_inside(host, confine) == "send ok"
        assert not [key for key in maps.berths.keys() if key.container < taken[0]]  # noqa: SIM118
    finally:
        for container in taken:
            maps.ferries.delete(ctypes.c_uint32(container))


def test_a_ferry_that_ended_by_itself_gives_its_places_back(host: Host) -> None:
    maps = host.maps
    ferries.reserve(maps, 1_000_000)
    maps.berths.put(ferries.berth_keys(1_000_000)[3], layout.BerthValue(family=4))
    ferries.end(host.settings, maps, 1_000_000)
    assert maps.ferries.get(ctypes.c_uint32(1_000_000)) is None and not maps.berths.keys()


# ---- the maps of rules ----------------------------------------------------------------------------------------

OPEN = parse_endpoint("pub", "0.0.0.0:8080", open_=True)


def pairs(count: int) -> Policy:
    """What an image may have in GRAFT_CONV_PAIRS: two entries for each of these ports."""
    return policy_from_pairs(" ".join(f"127.0.0.9:{port}=pub" for port in range(1, 2 * count + 1, 2)), {"pub": OPEN})


@contextmanager
def attached(host: Host, *policies: Policy, endpoints: tuple[Endpoint, ...] = (OPEN,)) -> Iterator[None]:
    """A container under each, one after the other."""
    with ExitStack() as stack, host.installation as graft:
        with graft.transaction() as change:
            for endpoint in endpoints:
                change.endpoints.add(endpoint)
        stack.callback(host.forget_endpoints)
        for policy in policies:
            path = stack.enter_context(new_cgroup("asking"))
            with graft.transaction() as change:
                made = change.containers.create(graft.compile(policy), path, host.netns.cookie, Transport.DIRECT)
            stack.callback(host.remove, made)
        yield


def test_images_do_not_fill_the_maps(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they may have together is a part, here a small one; the rest is for what the operator says."""
    monkeypatch.setattr(container_changes, "MAX_ASKED_ENTRIES", 100)
    operators = policy_from_flags("t", ["127.0.0.9:1-5=pub"], [])
    with pytest.raises(RefusedError, match="as many rules"), attached(host, pairs(20), pairs(20), pairs(20)):
        pass
    with attached(host, pairs(20), pairs(20), operators, operators):
        assert [one.asked for one in host.installation.containers.listing()] == [40, 40, 0, 0]
    assert host.leftovers() == []


def test_control_from_the_operator_as_many_are_accepted(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_changes, "MAX_ASKED_ENTRIES", 100)
    with attached(host, *[replace(pairs(20), origin=Origin.OPERATOR)] * 3):
        assert len(host.maps.ingress.keys()) == 120


def steps_to_apply(host: Host, monkeypatch: pytest.MonkeyPatch, path: Path) -> int:
    """How many entries of the maps a change of one container's policy looks at, when another has very many."""
    counted = itertools.count()
    get_next = Map.next_key

    def next_key(self: Map, key: object) -> object:  # type: ignore[type-arg]
        next(counted)
        return get_next(self, key)

    big = policy_from_flags("big", [f"127.0.1.{n}:1-65534=pub" for n in range(1, 81)], [])
    small, other = (policy_from_flags(name, [f"127.0.0.9:{port}=pub"], []) for name, port in (("a", 1), ("b", 2)))
    with attached(host, big), host.installation as graft:
        with graft.transaction() as change:
            made = change.containers.create(graft.compile(small), path, host.netns.cookie, Transport.DIRECT)
        monkeypatch.setattr(Map, "next_key", next_key)
        with graft.transaction() as change:
            changed = change.containers.apply(made, graft.compile(other))
        host.remove(changed)
        monkeypatch.setattr(Map, "next_key", get_next)
        assert len(host.maps.ingress.keys()) > 4000
    assert host.leftovers() == []
    return next(counted)


def test_a_policy_is_replaced_without_a_walk_through_those_of_others(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_cgroup("small") as path:
        assert steps_to_apply(host, monkeypatch, path) < 200


def test_control_where_a_rulesets_keys_are_looked_for_it_is_one(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(table: Map, first: object, _value: object) -> list[object]:  # type: ignore[type-arg]
        return [key for key in table.keys() if key.ruleset == first.ruleset]  # type: ignore[attr-defined]  # noqa: SIM118

    monkeypatch.setattr(rulesets, "_keys_of", walk)
    with new_cgroup("small") as path:
        assert steps_to_apply(host, monkeypatch, path) > 4000


def test_full_maps_are_an_error_in_one_line(without: Without, tmp_path: Path) -> None:
    """Of a host whose map has room for 64 rules."""
    host = without("room for rules")
    few, many = tmp_path / "few.yaml", tmp_path / "many.yaml"
    host.graft("ep", "add", "pub", "0.0.0.0:8080")
    few.write_text("name: few\ningress: [{bind: '127.0.0.9:80', endpoint: pub}]\n")
    many.write_text(
        "name: many\ningress: [{bind: '127.0.0.9:1-65534', endpoint: pub}, {bind: '*:80-85', endpoint: pub}]\n"
    )
    with new_cgroup("full") as path:
        refused = host.graft("attach", "--cgroup", path, "--policy", many, status=6)
        assert refused.stderr.startswith("graft: policy: no room") and len(refused.stderr.splitlines()) == 1
        assert host.leftovers() == []
        host.graft("attach", "--cgroup", path, "--policy", few)
        refused = host.graft("policy", "apply", "--cgroup", path, many, status=6)
        assert refused.stderr.startswith("graft: policy: no room") and len(refused.stderr.splitlines()) == 1
        assert len(host.maps.ingress.keys()) == 2
        host.remove_at(path)
    assert host.leftovers() == []
