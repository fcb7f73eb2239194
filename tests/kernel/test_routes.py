"""The host's own addresses and the broadcast addresses of its links, against iproute2."""

from __future__ import annotations

import json
from collections.abc import Callable
from ipaddress import IPv4Address, ip_address

import pytest

from graft.kernel.routes import local_routes
from tests.support.namespaces import HOST4, Netns

pytestmark = pytest.mark.kernel


def test_they_are_those_of_the_local_table(netns: Callable[[], Netns]) -> None:
    there = netns()
    there.run("ip", "address", "replace", f"{HOST4}/24", "brd", "10.98.0.255", "dev", "lo")
    there.run("ip", "address", "replace", "fd98::5/64", "dev", "lo", "nodad")
    there.run("ip", "route", "add", "local", "192.0.2.0/24", "dev", "lo")
    with there.inside():
        found = local_routes()
    listed = [
        one
        for family in ("-4", "-6")
        for one in json.loads(there.run("ip", family, "-j", "route", "show", "table", "local"))
        if "/" not in one["dst"]
    ]
    assert found.addresses == {ip_address(one["dst"]) for one in listed if one["type"] == "local"}
    assert found.broadcasts == {ip_address(one["dst"]) for one in listed if one["type"] == "broadcast"}
    assert IPv4Address("10.98.0.255") in found.broadcasts
    assert {ip_address(HOST4), ip_address("fd98::5")} <= found.addresses
