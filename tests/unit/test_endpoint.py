"""Endpoints, and the flags of `graft run` that name them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import UsageError
from graft.model.address import parse_bind_pattern, parse_prefix
from graft.model.endpoint import (
    ANY_PROTOCOL,
    Endpoint,
    Protocol,
    parse_egress_flag,
    parse_endpoint,
    parse_ingress_flag,
)
from graft.model.ports import PortRange, mapped_port


def test_an_endpoint_has_an_address_and_a_port() -> None:
    expected = Endpoint("nx4", ip_address("0.0.0.0"), 8080, ANY_PROTOCOL, None, False)
    assert parse_endpoint("nx4", "0.0.0.0:8080") == expected


def test_an_endpoint_is_shown_as_its_name_and_address() -> None:
    assert parse_endpoint("nx4", "0.0.0.0:8080").format() == "nx4 = 0.0.0.0:8080"
    assert parse_endpoint("nx6", "[::]:8080").format() == "nx6 = [::]:8080"


@pytest.mark.parametrize("text", ["0.0.0.0:dynamic", "0.0.0.0:0"])
def test_a_dynamic_port_is_zero_and_shown_as_dynamic(text: str) -> None:
    endpoint = parse_endpoint("out4", text)
    assert endpoint.port == 0
    assert endpoint.spec == "0.0.0.0:dynamic"


@pytest.mark.parametrize("spec", ["0.0.0.0:8080", "[::1]:1", "[2001:db8::1]:dynamic", "10.0.0.1:65535"])
def test_the_address_of_an_endpoint_reads_back_as_it_is_shown(spec: str) -> None:
    assert parse_endpoint("e", spec).spec == spec


@pytest.mark.parametrize(
    ("text", "protocols"), [("tcp", Protocol.TCP), ("udp", Protocol.UDP), ("any", Protocol.TCP | Protocol.UDP)]
)
def test_a_protocol_reads_back_as_it_is_shown(text: str, protocols: Protocol) -> None:
    endpoint = parse_endpoint("e", "1.2.3.4:5", proto=text)
    assert endpoint.protocols == protocols
    assert endpoint.protocols.label == text


@pytest.mark.parametrize("name", ["a", "0", "nx4", "ep-lo", "a.b_c-d", "x" * 31])
def test_a_name_may_have_letters_digits_dots_lines_and_dashes(name: str) -> None:
    assert parse_endpoint(name, "1.2.3.4:5").name == name


@pytest.mark.parametrize("name", ["", "x" * 32, "-a", ".a", "_a", "a b", "a=b", "a/b", "\u00e4", "a\n", "a\0", "a:b"])
def test_a_wrong_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^name: ") as caught:
        parse_endpoint(name, "1.2.3.4:5")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("netns", ["blue", "1234", "/run/netns/blue", "cni-0a1b"])
def test_a_namespace_is_a_name_a_pid_or_a_path(netns: str) -> None:
    assert parse_endpoint("e", "1.2.3.4:5", netns=netns).netns == netns


@pytest.mark.parametrize("netns", ["", ".", "..", "a/b", "../x", "a\0b", "/a\0b", "/" + "x" * 5000, "a b"])
def test_a_wrong_namespace_is_refused(netns: str) -> None:
    with pytest.raises(UsageError, match=r"^netns: "):
        parse_endpoint("e", "1.2.3.4:5", netns=netns)


@pytest.mark.parametrize("proto", ["", "TCP", "sctp", "tcp,udp"])
def test_a_wrong_protocol_is_refused(proto: str) -> None:
    with pytest.raises(UsageError, match=r"^protocol: "):
        parse_endpoint("e", "1.2.3.4:5", proto=proto)


@pytest.mark.parametrize(
    "spec", ["0.0.0.0", "[::1%lo]:80", "::1:80", "1.2.3.4:65536", "1.2.3.4:90-80", "1.2.3.4:0-9", "*:80"]
)
def test_a_wrong_address_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"^address: "):
        parse_endpoint("e", spec)


@pytest.mark.parametrize(
    ("spec", "port", "last", "count", "shown"),
    [
        ("0.0.0.0:20000-20100", 20000, 20100, 101, "0.0.0.0:20000-20100"),
        ("[::]:1-65535", 1, 65535, 65535, "[::]:1-65535"),
        ("0.0.0.0:80-80", 80, 0, 1, "0.0.0.0:80"),
        ("0.0.0.0:80", 80, 0, 1, "0.0.0.0:80"),
        ("0.0.0.0:0", 0, 0, 1, "0.0.0.0:dynamic"),
    ],
)
def test_an_endpoint_may_be_a_range_of_ports(spec: str, port: int, last: int, count: int, shown: str) -> None:
    endpoint = parse_endpoint("e", spec)
    assert (endpoint.port, endpoint.last_port, endpoint.port_count, endpoint.spec) == (port, last, count, shown)
    assert parse_endpoint("e", endpoint.spec) == endpoint


def test_a_bind_of_port_0_has_a_pattern_of_its_own() -> None:
    assert parse_bind_pattern("*:0").ports == PortRange(0, 0)
    assert str(parse_bind_pattern("*:0")) == "*:0"
    for text in ("*:0-9", "*:00", "*:-0", "*:dynamic"):
        with pytest.raises(UsageError, match=r"^bind: "):
            parse_bind_pattern(text)


@given(st.integers(1, 65535), st.integers(1, 65535), st.integers(1, 300), st.integers(0, 65535))
def test_the_mapping_of_a_range_is_one_to_one(first: int, port: int, size: int, asked: int) -> None:
    size = min(size, 65536 - first, 65536 - port)
    last = port + size - 1 if size > 1 else 0
    real = [mapped_port(one, first, port, last) for one in range(first, first + size)]
    assert real == list(range(port, port + size))
    if size > 1:
        assert (mapped_port(asked, first, port, last) is None) == (asked not in range(first, first + size))


def test_port_0_becomes_a_dynamic_port_only() -> None:
    assert mapped_port(0, 0, 0, 0) == 0
    assert mapped_port(0, 0, 80, 0) is None
    assert mapped_port(0, 0, 80, 90) is None
    assert mapped_port(0, 1, 80, 90) is None


def test_an_ingress_flag_is_a_bind_and_an_endpoint() -> None:
    assert parse_ingress_flag("0.0.0.0:8000-8099=nx4") == (parse_bind_pattern("0.0.0.0:8000-8099"), "nx4")
    assert parse_ingress_flag("*:80=nx4") == (parse_bind_pattern("*:80"), "nx4")
    assert parse_ingress_flag("[::]:80=nx6") == (parse_bind_pattern("[::]:80"), "nx6")


def test_an_egress_flag_is_a_prefix_and_an_endpoint() -> None:
    assert parse_egress_flag("0.0.0.0/0=out4") == (parse_prefix("0.0.0.0/0"), "out4")
    assert parse_egress_flag("::/0=out6") == (parse_prefix("::/0"), "out6")


@pytest.mark.parametrize("text", ["", "=", "0.0.0.0:80", "0.0.0.0:80=", "=nx4", "0.0.0.0=nx4", "0.0.0.0:80=a b"])
def test_a_wrong_ingress_flag_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^-i: "):
        parse_ingress_flag(text)


@pytest.mark.parametrize("text", ["", "0.0.0.0/0", "0.0.0.0/0=", "=out4", "0.0.0.0:80=out4", "0.0.0.1/0=out4"])
def test_a_wrong_egress_flag_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^-e: "):
        parse_egress_flag(text)
