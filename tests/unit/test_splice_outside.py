"""Whose turns a connection has when its peer outside of the container makes calls slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graft.splice.event_loop import EventLoop
from graft.splice.outside import OutsidePeer
from graft.splice.resources import ContainerResources, DaemonResources

NUMBER = 7


@pytest.fixture
def resources() -> Iterator[ContainerResources]:
    loop = EventLoop(lambda: None)
    daemon = DaemonResources(loop, 1000)
    yield daemon.add_container(NUMBER)
    daemon.close()
    loop.shut_down()


def hold(resources: ContainerResources) -> None:
    resources.loop._turns.hold(-NUMBER, 1e12)


def test_a_peer_has_its_containers_turns_until_it_is_slow(resources: ContainerResources) -> None:
    peer, moved = OutsidePeer(resources, "192.0.2.1"), list[bool]()
    peer.on_slow(moved.append)
    assert peer.owner == NUMBER
    assert peer.count(0.003) == peer.owner == -NUMBER
    assert moved == [False]


@pytest.mark.parametrize(("seconds", "is_reset"), [(0.06, True), (0.04, False)])
def test_the_third_very_slow_call_within_a_minute_resets_its_connection(
    resources: ContainerResources, monkeypatch: pytest.MonkeyPatch, seconds: float, is_reset: bool
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("graft.splice.outside.time.monotonic", lambda: clock[0])
    peer, moved = OutsidePeer(resources, "192.0.2.1"), list[bool]()
    peer.on_slow(moved.append)
    for clock[0] in (1000.0, 1050.0, 1070.0, 1080.0):
        peer.count(seconds)
    assert moved == [False, False, False, is_reset]


@pytest.mark.parametrize(
    ("first", "second", "is_known"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("127.0.0.1", "127.9.9.9", True),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
def test_new_connections_from_its_address_wait_with_it(
    resources: ContainerResources, first: str, second: str, is_known: bool
) -> None:
    OutsidePeer(resources, first).count(0.003)
    assert OutsidePeer(resources, second).owner == (-NUMBER if is_known else NUMBER)


def test_who_comes_from_another_address_meanwhile_has_the_container_wait(resources: ContainerResources) -> None:
    same = OutsidePeer(resources, "192.0.2.1")
    OutsidePeer(resources, "192.0.2.1").count(0.003)
    hold(resources)
    assert same.count(0.003) == -NUMBER
    assert OutsidePeer(resources, "192.0.2.2").count(0.003) == NUMBER
    assert OutsidePeer(resources, "192.0.2.2").count(0.003) == -NUMBER


def test_notes_of_addresses_are_limited(resources: ContainerResources) -> None:
    for number in range(3000):
        resources.note_slow_peer(f"198.51.{number // 256}.{number % 256}", 1e12)
    assert len(resources.slow_peers) == 1024
