"""Who passes for a client of a container's server, in transport splice, when graftd was killed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.hostile.test_tenth_reading_splice import DECEIVER, FAMILIES, Family, exchange_of, served, stranger
from tests.support.installation import Host
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e

Without = Callable[[str], Host]


def passes_for_a_client(host: Host, family: Family) -> bool:
    """Whether a server takes what a stranger sends, who has the port of a killed graftd, for a client's."""
    with served(host, family) as (container, server, client):
        client.send(b"question")
        assert server.recvfrom(100) == (b"question", client.getsockname())
        place = exchange_of(container, family, False)
        host.kill_daemon()
        with stranger(container, DECEIVER, *place, family.loopback, 5300) as other:
            other.says("sent")
            server.settimeout(PATIENCE)
            try:
                assert server.recvfrom(100) == (b"forged", client.getsockname())
            except TimeoutError:
                return False
            return True


@FAMILIES
def test_nobody_who_takes_the_relays_port_passes_for_a_client(host: Host, family: Family) -> None:
    assert not passes_for_a_client(host, family)


@FAMILIES
def test_control_where_the_server_hears_anybody_he_does(without: Without, family: Family) -> None:
    assert passes_for_a_client(without("datagram relay's mark on answers"), family)
