"""Which container a socket belongs to, and whether a rule granted it: by its tag, or by its address."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from graft.commands import ps
from graft.datapath import layout
from graft.errors import GraftError
from graft.kernel.sockdiag import Identity
from graft.kernel.sockets import ListedSocket
from graft.model.endpoint import parse_endpoint
from graft.model.settings import Settings
from graft.model.transport import Home, Transport
from graft.splice import client as splice
from graft.state import inventory
from graft.state.inventory import ContainerSocket, HostStack
from graft.state.records import Container
from graft.state.socket_holders import Place

STACK = HostStack({5: parse_endpoint("nx4", "0.0.0.0:8080"), 6: parse_endpoint("out4", "0.0.0.0:dynamic")}, ())
HERE = (Place(100, 100, 3),)


def container(transport: Transport = Transport.DIRECT, number: int = 7) -> Container:
    return Container(number, "web", "/none", transport, 1, "web", ("nx4",))


def tag(owner: int = 7, endpoint: int = 0, bound: bool = False) -> bytes:
    made = layout.Tag(container=owner, endpoint=endpoint, home=Home.HOST, family=4, port=80)
    made.bound_port = 8080 if bound else 0
    return bytes(made)


def socket(stored: bytes | None = None, protocol: str = "tcp", places: tuple[Place, ...] = HERE) -> ContainerSocket:
    state = "unconnected" if protocol == "udp" else "listening"
    listed = ListedSocket(1, protocol, state, "0.0.0.0:8080", "0.0.0.0:0", Identity(2, 6, bytes(48)), 0, stored)
    return ContainerSocket(listed, Path("/none"), places)


def test_a_bound_socket_is_shown_with_its_endpoint_and_the_address_asked_for() -> None:
    found = inventory._with_grant(container(), STACK, socket(tag(endpoint=5, bound=True)))
    assert (found.granted, found.endpoint, found.asked) == (True, "nx4", "0.0.0.0:80")
    assert str(found) == "tcp listening 0.0.0.0:8080 (process 100, bound as 0.0.0.0:80 to nx4)"


def test_a_socket_whose_endpoint_was_deleted_still_counts_as_granted() -> None:
    found = inventory._with_grant(container(), STACK, socket(tag(endpoint=99)))
    assert (found.granted, found.endpoint, found.asked) == (True, "(deleted)", None)


@pytest.mark.parametrize(("transport", "granted"), [(Transport.SWAP, True), (Transport.DIRECT, False)])
def test_without_an_endpoint_only_a_swapped_socket_counts_as_granted(transport: Transport, granted: bool) -> None:
    assert inventory._with_grant(container(transport), STACK, socket(tag())).granted == granted


def test_the_tag_of_another_container_or_of_a_relay_grants_nothing() -> None:
    assert not inventory._with_grant(container(), STACK, socket(tag(owner=8, endpoint=5))).granted
    sock = socket(tag(endpoint=5))
    stack = replace(STACK, graftd=sock.listed.cgroup)
    assert not inventory._with_grant(container(Transport.SPLICE), stack, sock).granted


def test_with_splice_a_tagged_socket_of_any_cgroup_but_graftds_is_the_containers() -> None:
    stack = replace(STACK, graftd=77)
    assert inventory._with_grant(container(Transport.SPLICE), stack, socket(tag(endpoint=5))).granted


def test_a_datagram_socket_of_no_process_is_judged_by_its_address() -> None:
    assert inventory._with_grant(container(), STACK, socket(protocol="udp", places=())).endpoint == "nx4"
    assert not inventory._with_grant(container(), STACK, socket(protocol="udp")).granted, (
        "its tag could be read, and there is none"
    )
    assert not inventory._with_grant(container(), STACK, socket(places=())).granted, (
        "the tag of a TCP socket comes with the list"
    )


@pytest.mark.parametrize(("port", "found"), [(8079, None), (8080, "rtp"), (8090, "rtp"), (8091, None)])
def test_a_datagram_socket_of_no_process_may_be_at_any_port_of_a_range(port: int, found: str | None) -> None:
    stack = HostStack({7: parse_endpoint("rtp", "0.0.0.0:8080-8090")}, ())
    one = socket(protocol="udp", places=())
    one = replace(one, listed=replace(one.listed, local=f"0.0.0.0:{port}"))
    assert inventory._with_grant(replace(container(), endpoints=("rtp",)), stack, one).endpoint == found


def test_a_socket_of_no_process_is_shown_as_such() -> None:
    assert str(socket(places=())) == "tcp listening 0.0.0.0:8080 (in no process)"


def test_a_daemon_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def describe(_settings: Settings, one: Container) -> dict[str, object]:
        asked.append(one.id)
        raise GraftError("the daemon does not answer")

    monkeypatch.setattr(splice, "describe", describe)
    found = ps._relays(Settings.from_environment({}), [container(Transport.SPLICE, number) for number in (1, 2)])
    assert asked == [1]
    assert {number: one["problem"] for number, one in found.items()} == dict.fromkeys(
        (1, 2), "the daemon does not answer"
    )
