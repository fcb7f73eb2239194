"""Whose a listed socket is, without a look at any process: by its tag, else by the cgroup where it was made."""

from __future__ import annotations

import pytest

from graft.datapath import layout
from graft.errors import UsageError
from graft.kernel.sockdiag import Identity
from graft.kernel.sockets import ListedSocket
from graft.model.transport import Home
from graft.splice.traffic import Relayed, Traffic, parse_traffic
from graft.state.socket_counts import Owners, tally

GRAFTD, WEB_CGROUP, SUPERVISORS = 500, 70, 71
OWNERS = Owners(
    relayed=frozenset([9]),
    graftd=GRAFTD,
    by_cgroup={WEB_CGROUP: 7, SUPERVISORS: 7, 90: 9},
    ferry_ports={7: frozenset([5000])},
)


def listed(
    tagged: int = 0, cgroup: int = 0, protocol: str = "tcp", home: Home = Home.HOST, local: str = "0.0.0.0:80"
) -> ListedSocket:
    stored = bytes(layout.Tag(container=tagged, home=home)) if tagged else None
    return ListedSocket(1, protocol, "listening", local, "0.0.0.0:0", Identity(2, 6, bytes(48)), cgroup, stored)


@pytest.mark.parametrize(
    ("sock", "owner"),
    [
        (listed(tagged=7), 7),
        (listed(tagged=7, cgroup=90), 7),  # the tag says more than where it was made
        (listed(cgroup=WEB_CGROUP), 7),
        (listed(cgroup=SUPERVISORS, protocol="udp"), 7),
        (listed(cgroup=SUPERVISORS, protocol="udp", local="127.254.0.1:5000"), 0),  # the ferry's
        (listed(tagged=9, cgroup=GRAFTD), 0),  # graftd's, for a container with transport splice
        (listed(tagged=9, cgroup=90), 9),
        (listed(tagged=7, home=Home.CONTAINER), 0),
        (listed(cgroup=1234), 0),
    ],
)
def test_a_socket_belongs_to(sock: ListedSocket, owner: int) -> None:
    assert OWNERS.of(sock) == owner


def test_sockets_are_counted_by_protocol_and_state() -> None:
    found = [listed(tagged=7), listed(cgroup=WEB_CGROUP), listed(cgroup=SUPERVISORS, protocol="udp"), listed()]
    assert tally(OWNERS, found) == {7: {("tcp", "listening"): 2, ("udp", "listening"): 1}}


def test_what_graftd_has_relayed_is_read() -> None:
    answer = {"pid": 12, "started": 3.5, "containers": {"7": {"connections": 1, "bytes_in": 9}}}
    assert parse_traffic(answer) == Traffic(12, 3.5, {7: Relayed(connections=1, bytes_in=9)})


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"started": "now"},
        {"started": 1, "containers": []},
        {"started": 1, "containers": {"web": {}}},
        {"started": 1, "containers": {"7": {"bytes_in": -1}}},
        {"started": 1, "containers": {"7": 1}},
    ],
)
def test_an_answer_of_another_shape_is_refused(answer: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        parse_traffic(answer)
