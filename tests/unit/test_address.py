"""Addresses, ports and prefixes from text and back."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import UsageError
from graft.model.address import (
    BindPattern,
    Prefix,
    SocketAddress,
    parse_bind_pattern,
    parse_port_range,
    parse_prefix,
    parse_socket_address,
)
from graft.model.ports import EVERY_PORT, MAX_PORT, PortRange, mask_of, prefixes_of, ranges_of, split_range

PORTS = st.integers(1, MAX_PORT)
RANGES = st.tuples(st.integers(0, MAX_PORT), st.integers(0, MAX_PORT)).map(lambda pair: PortRange(*sorted(pair)))
ADDRESSES = st.ip_addresses().filter(lambda ip: ip.version == 4 or ip.ipv4_mapped is None)


@given(ADDRESSES, PORTS)
def test_a_socket_address_reads_back_as_it_was_written(ip: IPv4Address | IPv6Address, port: int) -> None:
    address = SocketAddress(ip, port)
    assert parse_socket_address(str(address)) == address


@given(st.none() | ADDRESSES, RANGES.filter(lambda ports: ports.first > 0))
def test_a_bind_pattern_reads_back_as_it_was_written(ip: IPv4Address | IPv6Address | None, ports: PortRange) -> None:
    pattern = BindPattern(ip, ports)
    assert parse_bind_pattern(str(pattern)) == pattern


def test_an_ipv4_address_fills_the_first_four_of_sixteen_bytes() -> None:
    assert parse_socket_address("1.2.3.4:80").packed16 == b"\x01\x02\x03\x04" + bytes(12)


def test_an_ipv6_address_fills_all_sixteen_bytes() -> None:
    assert parse_socket_address("[::1]:80").packed16 == bytes(15) + b"\x01"


@pytest.mark.parametrize(("text", "family"), [("1.2.3.4:80", 4), ("[::1]:80", 6), ("[::ffff:1.2.3.4]:80", 4)])
def test_an_address_knows_its_family(text: str, family: int) -> None:
    assert parse_socket_address(text).family == family


def test_an_ipv4_mapped_address_is_the_ipv4_address_in_it() -> None:
    assert parse_bind_pattern("[::ffff:1.2.3.4]:80") == parse_bind_pattern("1.2.3.4:80")


def test_an_ipv4_mapped_prefix_is_the_ipv4_prefix_in_it() -> None:
    assert parse_prefix("::ffff:10.0.0.0/104") == parse_prefix("10.0.0.0/8")


def test_the_prefix_of_all_mapped_addresses_is_all_of_ipv4() -> None:
    assert parse_prefix("::ffff:0.0.0.0/96") == parse_prefix("0.0.0.0/0")


def test_an_address_alone_is_a_prefix_that_holds_only_itself() -> None:
    assert (parse_prefix("192.0.2.1").length, parse_prefix("::1").length) == (32, 128)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no port"),
        ("0.0.0.0", "has no port"),
        ("0.0.0.0:", "has no port"),
        ("[::1]", "has no port"),
        ("::1:80", "without brackets"),
        ("[::1:80", "not an IPv6 address in brackets"),
        ("[1.2.3.4]:80", "not an IPv6 address in brackets"),
        ("[fe80::1%eth0]:80", "has a zone"),
        ("[gggg::]:80", "not an IP address"),
        ("1.2.3:80", "not an IP address"),
        ("1.2.3.256:80", "not an IP address"),
        ("01.2.3.4:80", "not an IP address"),
        ("localhost:80", "not an IP address"),
        (":80", "not an IP address"),
        (" 1.2.3.4:80", "not an IP address"),
        ("1.2.3.4:0", "out of range"),
        ("1.2.3.4:65536", "out of range"),
        ("1.2.3.4:99999999999999999999", "out of range"),
        ("1.2.3.4:-1", "not a port"),
        ("1.2.3.4:+1", "not a port"),
        ("1.2.3.4:080", "not a port"),
        ("1.2.3.4:0x50", "not a port"),
        ("1.2.3.4:8\u0660", "not a port"),
        ("1.2.3.4:http", "not a port"),
        ("1.2.3.4:dynamic", "not a port"),
        ("*:80", "not an IP address"),
    ],
)
def test_a_wrong_socket_address_is_refused_in_one_line_that_names_the_field(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_socket_address(text, "address")
    assert caught.value.message.startswith("address: ")
    assert reason in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_an_error_of_use(text: str) -> None:
    for parse in (parse_socket_address, parse_bind_pattern, parse_prefix, parse_port_range):
        try:
            parse(text, "f")
        except UsageError as error:
            assert error.message.startswith("f: ")
            assert "\n" not in error.message


@pytest.mark.parametrize("text", ["*:80-", "*:-80", "*:90-80", "*:0-80", "*:80-65536", "*:80-90-95", "*:"])
def test_a_wrong_range_of_ports_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^bind: "):
        parse_bind_pattern(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10.0.0.1/8", "has bits set"),
        ("10.0.0.0/33", "not a prefix length"),
        ("10.0.0.0/", "not a prefix length"),
        ("10.0.0.0/08", "not a prefix length"),
        ("10.0.0.0/255.0.0.0", "not a prefix length"),
        ("::/129", "not a prefix length"),
        ("[::]/0", "not a prefix"),
        ("fe80::%eth0/64", "has a zone"),
        ("10/8", "not a prefix"),
        ("*", "not a prefix"),
        ("", "not a prefix"),
    ],
)
def test_a_wrong_prefix_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"^to: .*{reason}"):
        parse_prefix(text)


def test_the_error_for_bits_after_the_prefix_suggests_a_prefix() -> None:
    with pytest.raises(UsageError) as caught:
        parse_prefix("10.1.2.3/8")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("10.0.0.0/8")


def test_a_long_text_is_cut_in_the_error() -> None:
    with pytest.raises(UsageError) as caught:
        parse_socket_address("x" * 10_000 + ":80")
    assert len(caught.value.message) < 200


def test_a_prefix_holds_the_addresses_of_its_own_family_only() -> None:
    assert ip_address("10.1.2.3") in Prefix(parse_prefix("10.0.0.0/8").network)
    assert ip_address("::1") not in parse_prefix("0.0.0.0/0")


@given(RANGES)
def test_the_prefixes_of_a_range_hold_each_of_its_ports_once_and_no_other(ports: PortRange) -> None:
    assert all(port % (1 << (16 - bits)) == 0 for port, bits in split_range(ports))
    blocks = [(port, port + (1 << (16 - bits)) - 1) for port, bits in split_range(ports)]
    assert blocks[0][0] == ports.first
    assert blocks[-1][1] == ports.last
    assert all(earlier[1] + 1 == later[0] for earlier, later in pairwise(blocks))
    assert len(blocks) <= 30


def test_all_ports_are_one_prefix_of_no_bits() -> None:
    assert list(prefixes_of(EVERY_PORT)) == [(0, 0)]


@given(st.lists(RANGES, max_size=6))
def test_a_set_of_ports_gives_back_its_runs(ranges: list[PortRange]) -> None:
    runs = list(ranges_of(mask_of(ranges)))
    ports = {port for run in runs for port in (run.first, run.last)}
    assert all(any(port in given_range for given_range in ranges) for port in ports)
    assert all(earlier.last + 1 < later.first for earlier, later in pairwise(runs))
    assert mask_of(runs) == mask_of(ranges)
