"""Where metrics may be served: at a unix socket, or at a loopback address."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from graft.errors import UsageError
from graft.model.scrape_address import LoopbackPort, parse_listen
from graft.model.unix_socket import UnixSocket


def test_a_unix_socket_is_roots_only_unless_the_operator_says_otherwise() -> None:
    assert parse_listen("unix:/run/m.sock") == UnixSocket("/run/m.sock", None, 0o600)
    assert parse_listen("unix:/run/m.sock", "prometheus", "0660") == UnixSocket("/run/m.sock", "prometheus", 0o660)


@pytest.mark.parametrize(("text", "address"), [("127.0.0.1:9469", "127.0.0.1"), ("[::1]:9469", "::1")])
def test_a_loopback_address_is_accepted(text: str, address: str) -> None:
    assert parse_listen(text) == LoopbackPort(ip_address(address), 9469)


@pytest.mark.parametrize("text", ["0.0.0.0:9469", "[::]:9469", "192.0.2.1:9469", "[2001:db8::1]:9469"])
def test_any_other_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--listen: .* is not a loopback address"):
        parse_listen(text)


@pytest.mark.parametrize(
    ("text", "owner", "mode", "field"),
    [
        ("9469", None, None, "--listen"),
        ("localhost:9469", None, None, "--listen"),
        ("127.0.0.1:0", None, None, "--listen"),
        ("unix:m.sock", None, None, "--listen"),
        ("unix:/run/m.sock", "a b", None, "--owner"),
        ("unix:/run/m.sock", None, "9", "--mode"),
        ("127.0.0.1:9469", "root", None, "--owner"),
        ("127.0.0.1:9469", None, "0600", "--mode"),
    ],
)
def test_an_error_names_its_option(text: str, owner: str | None, mode: str | None, field: str) -> None:
    with pytest.raises(UsageError, match=f"^{field}: "):
        parse_listen(text, owner, mode)
