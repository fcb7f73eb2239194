"""What is left of containers that are not served yet: judged at each tick, and closed when it takes too long."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from graft.datapath.layout import USE_INGRESS
from graft.errors import KernelError
from graft.kernel import netns
from graft.splice import unserved
from graft.splice.kept import Found
from graft.splice.kept_records import Kind, Record
from graft.splice.unserved import Unserved


class Left:
    """In the place of `Kept`."""

    def __init__(self, *found: Found) -> None:
        self.found = list(found)

    @property
    def has_found(self) -> bool:
        return bool(self.found)

    def found_containers(self) -> set[int]:
        return {one.record.container for one in self.found}

    def close_untaken(self, is_to_close: Callable[[Found], bool]) -> None:
        self.found = [one for one in self.found if not is_to_close(one)]


class Grants:
    """In the place of the maps: container 7 has ruleset 70, by which it listens on endpoint 3."""

    def __init__(self, sock: socket.socket) -> None:
        self.tag: Any = SimpleNamespace(container=7, endpoint=3)
        self.container: Any = SimpleNamespace(ruleset=70)
        self.endpoint: Any = SimpleNamespace(netns=netns.socket_cookie(sock))
        self.used = {(70, 3): USE_INGRESS}
        self.tags = SimpleNamespace(get=lambda _: self.tag)
        self.containers = SimpleNamespace(get=lambda _: self.container)
        self.endpoints = SimpleNamespace(get=lambda _: self.endpoint)
        self.uses = SimpleNamespace(get=self._use)

    def _use(self, key: Any) -> Any:
        how = self.used.get((key.ruleset, key.endpoint))
        return None if how is None else SimpleNamespace(value=how)


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as made:
        yield made


def listener(sock: socket.socket, container: int = 7) -> Found:
    return Found(0, Record(Kind.LISTENER, container), (sock,))


def no_maps(_key: object) -> None:
    raise KernelError("Graft is not up")


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("nothing", lambda _: None),
        ("its tag is another container's", lambda grants: setattr(grants.tag, "container", 8)),
        ("it has no tag", lambda grants: setattr(grants, "tag", None)),
        ("the container has no rules", lambda grants: setattr(grants, "container", None)),
        ("the endpoint is deleted", lambda grants: setattr(grants, "endpoint", None)),
        ("the endpoint is in another namespace", lambda grants: setattr(grants.endpoint, "netns", 1)),
        ("the rule is gone", lambda grants: grants.used.clear()),
        ("the rule is for what goes out", lambda grants: grants.used.update({(70, 3): 0})),
        ("the policy was replaced", lambda grants: setattr(grants.container, "ruleset", 71)),
        ("Graft is not up", lambda grants: setattr(grants.uses, "get", no_maps)),
    ],
)
def test_a_listener_stays_as_long_as_it_is_granted(
    sock: socket.socket, what: str, change: Callable[[Grants], None]
) -> None:
    left: Any = Left(listener(sock))
    grants: Any = Grants(sock)
    judged = Unserved(left, grants)
    judged.close({7}, set())
    assert left.has_found
    change(grants)
    judged.close({7}, set())
    assert left.has_found == (what == "nothing")


def test_who_serves_judges_by_itself(sock: socket.socket) -> None:
    left: Any = Left(listener(sock))
    grants: Any = Grants(sock)
    grants.used.clear()
    Unserved(left, grants).close({7}, {7})
    assert left.has_found


def test_nothing_stays_of_a_container_without_a_record(sock: socket.socket) -> None:
    left: Any = Left(listener(sock), listener(sock, 0), Found(1, Record(Kind.INBOUND, 7), (sock,)))
    grants: Any = Grants(sock)
    Unserved(left, grants).close(set(), set())
    assert left.found_containers() == {0}


def test_nothing_stays_of_one_that_is_not_served_in_time(sock: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    left: Any = Left(*(listener(sock, number) for number in (0, 7)), Found(1, Record(Kind.INBOUND, 7), (sock,)))
    left.found.append(Found(2, Record(Kind.INBOUND, 8), (sock,)))
    grants: Any = Grants(sock)
    judged = Unserved(left, grants)
    judged.close({7, 8}, {8})
    assert len(left.found) == 4
    now = time.monotonic() + unserved.SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: now)
    judged.close({7, 8}, {8})
    assert left.found_containers() == {0, 8}
