"""Endpoints of type unix: as they are written, what policies may say of them, and the map entries."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import threading
from pathlib import Path

import pytest

from graft.errors import RefusedError, UsageError
from graft.kernel import unix_files
from graft.kernel.unix_files import Target, UnixPathError
from graft.model.endpoint import Endpoint, Protocol, parse_endpoint
from graft.model.transport import Transport
from graft.model.unix_socket import UNIX_FAMILY, UnixSocket, path_key
from graft.policy.compiler import compile_policy
from graft.policy.model import policy_from_flags
from graft.policy.reader import check_policy
from graft.policy.validator import needs_unix_relay, refuse_without_supervisor
from graft.swap.unix_bind import parse_path

APP = parse_endpoint("app", "unix:/run/app.sock", owner="www:www", mode="0600")
TCP = parse_endpoint("tcp", "0.0.0.0:80")
KNOWN: dict[str, Endpoint] = {"app": APP, "tcp": TCP}


# ---- as it is written -------------------------------------------------------------------------------


def test_an_endpoint_of_a_unix_socket_has_a_path_an_owner_and_a_mode() -> None:
    assert APP.unix == UnixSocket("/run/app.sock", "www:www", 0o600)
    assert APP.protocols == Protocol.TCP
    assert APP.format() == "app = unix:/run/app.sock"
    assert parse_endpoint("a", "unix:/a").unix == UnixSocket("/a", None, 0o660)


@pytest.mark.parametrize(
    ("spec", "more", "message"),
    [
        ("unix:app.sock", {}, "address: 'unix:app.sock' is not an absolute path"),
        ("unix:", {}, "address: 'unix:' is not an absolute path"),
        ("unix:/", {}, "address: 'unix:/' is not a plain path"),
        ("unix:/a/../b", {}, "address: 'unix:/a/../b' is not a plain path"),
        ("unix:/a//b", {}, "address: 'unix:/a//b' is not a plain path"),
        ("unix:/a/", {}, "address: 'unix:/a/' is not a plain path"),
        ("unix:/a\0b", {}, "address: 'unix:/a\\x00b' has characters that a path should not have"),
        ("unix:/" + "a" * 107, {}, "address: the path has 108 bytes"),
        ("unix:/a", {"proto": "udp"}, "protocol: a unix socket carries TCP connections, no datagrams"),
        ("unix:/a", {"netns": "blue"}, "netns: a unix socket is a file of the host, in no network namespace"),
        ("unix:/a", {"dual_stack": True}, "dual stack: a unix socket has no IP address"),
        ("unix:/a", {"multicast": ["239.1.1.1"]}, "multicast: a unix socket has no IP address"),
        ("unix:/a", {"mode": "0999"}, "mode: '0999' is not a mode"),
        ("unix:/a", {"mode": "4755"}, "mode: '4755' is not a mode"),
        ("unix:/a", {"owner": "a:b:c"}, "owner: 'a:b:c' is not an owner"),
        ("0.0.0.0:80", {"owner": "www"}, "owner: only a unix socket has one"),
        ("0.0.0.0:80", {"mode": "0600"}, "mode: only a unix socket has one"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(spec: str, more: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint("a", spec, **more)  # type: ignore[arg-type]
    assert caught.value.message == message


# ---- policies ---------------------------------------------------------------------------------------


def problems(rules: str) -> list[str]:
    found = check_policy(f"name: p\n{rules}", KNOWN).problems
    return [f"{one.field}: {one.message}" for one in found]


@pytest.mark.parametrize(
    "rules",
    [
        "ingress: [{bind: 0.0.0.0:80, endpoint: app}]",
        "ingress: [{bind: '[2001:db8::1]:80', endpoint: app}, {bind: '*:81', endpoint: app}]",
        "ingress: [{bind: 'unix:/own.sock', endpoint: app}]",
        "egress: [{to: 10.0.0.5, endpoint: app}, {to: '2001:db8::1', ports: [80], endpoint: app}]",
        "endpoints: {a: 'unix:/a', b: {address: 'unix:/b', owner: 'x:y', mode: '0600', open: true}}",
    ],
)
def test_what_can_be_said(rules: str) -> None:
    assert problems(rules) == []


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            "ingress: [{bind: 0.0.0.0:80, endpoint: app, protocol: udp}]",
            "ingress[0].protocol: the rule is for udp, its endpoint app for tcp",
        ),
        (
            "egress: [{to: 10.0.0.0/8, endpoint: app}]",
            "egress[0].to: app is a unix socket, which connections reach, and no source of connections",
        ),
        (
            "ingress: [{bind: 'unix:/own.sock', endpoint: tcp}]",
            "ingress[0].endpoint: a bind of a unix socket cannot be redirected to 0.0.0.0:80",
        ),
        (
            "endpoints: {b: 'unix:/b'}\ningress: [{bind: 'unix:/o', endpoint: app}, {bind: 'unix:/o', endpoint: b}]",
            "ingress[1].bind: unix:/o is redirected to b, but ingress[0] (line 3) redirects it to app",
        ),
        ("ingress: [{bind: 'unix:/o', endpoint: app, protocol: tcp}]", "ingress[0].protocol: unknown key"),
        ("ingress: [{bind: 'unix:o', endpoint: app}]", "ingress[0].bind: 'unix:o' is not an absolute path"),
        ("ingress: [{bind: 'unix:/o', endpoint: none}]", "ingress[0].endpoint: endpoint 'none' not found"),
        ("egress: [{to: 'unix:/o', endpoint: app}]", "egress[0].to: 'unix:/o' is not a prefix"),
        (
            "endpoints: {a: {address: 'unix:/a', netns: blue}}",
            "endpoints.a.netns: a unix socket is a file of the host, in no network namespace",
        ),
        (
            "endpoints: {a: {address: 'unix:/a', dual_stack: true}}",
            "endpoints.a.dual_stack: a unix socket has no IP address",
        ),
        (
            "endpoints: {a: {address: 0.0.0.0:80, mode: '0600'}}",
            "endpoints.a.mode: only a unix socket has one",
        ),
    ],
)
def test_what_cannot_be_said(rules: str, expected: str) -> None:
    assert problems(rules) == [expected]


def test_a_rule_for_any_address_is_for_both_families() -> None:
    rules = compile_policy(policy_from_flags("p", ["*:80=app"], []), KNOWN)
    assert {(one.family, one.address) for one in rules.ingress} >= {(4, None), (6, None)}
    assert {one.endpoint for one in rules.ingress} == {"app"}


def test_a_rule_for_a_path_has_the_key_of_its_bytes() -> None:
    policy = policy_from_flags("p", ["unix:/own.sock=app"], [])
    (entry,) = compile_policy(policy, KNOWN).ingress
    assert (entry.family, entry.address, entry.port, entry.port_bits) == (UNIX_FAMILY, path_key(b"/own.sock"), 0, 16)
    assert path_key(b"/own.sock") != path_key(b"/own.soc")


def test_only_rules_for_tcp_need_the_relay_and_only_rules_for_paths_a_supervisor() -> None:
    paths, binds = policy_from_flags("p", ["unix:/o=app"], []), policy_from_flags("p", ["0.0.0.0:80=app"], [])
    assert not needs_unix_relay(paths, KNOWN)
    assert needs_unix_relay(binds, KNOWN)
    assert needs_unix_relay(policy_from_flags("p", [], ["10.0.0.5=app"]), KNOWN)
    assert not needs_unix_relay(policy_from_flags("p", ["0.0.0.0:80=tcp"], []), KNOWN)
    refuse_without_supervisor(paths, Transport.SWAP)
    refuse_without_supervisor(binds, Transport.DIRECT)
    with pytest.raises(RefusedError):
        refuse_without_supervisor(paths, Transport.DIRECT)


# ---- what a program passes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/own.sock", b"/own.sock"),
        (b"/own.sock\0and more", b"/own.sock"),
        (b"\0abstract", None),
        (b"", None),
        (b"/\xff\xfe", b"/\xff\xfe"),
    ],
)
def test_a_path_ends_at_its_zero_byte_or_with_the_address(raw: bytes, path: bytes | None) -> None:
    assert parse_path(struct.pack("=H", socket.AF_UNIX) + raw) == path


def test_other_families_have_no_path() -> None:
    assert parse_path(struct.pack("=H", socket.AF_INET) + b"/own.sock") is None


# ---- files (as root) --------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="chroot(2) and chown(2) are root's")


@pytest.fixture
def sock() -> socket.socket:
    return socket.socket(socket.AF_UNIX)


@needs_root
def test_a_socket_has_its_owner_and_mode_and_shows_what_was_asked_for(tmp_path: Path, sock: socket.socket) -> None:
    path = tmp_path / "a.sock"
    with sock:
        file = unix_files.bind(sock, Target(str(path), 1234, 1235, 0o640), b"/in/the/container.sock", 5)
        status = path.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 1235, 0o640)
        assert (status.st_dev, status.st_ino) == file
        assert sock.getsockname() == "/in/the/container.sock"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert [one.name for one in tmp_path.iterdir()] == ["a.sock"]
    unix_files.remove(str(path), file)
    assert list(tmp_path.iterdir()) == []


@needs_root
def test_the_process_keeps_its_root_directory(tmp_path: Path, sock: socket.socket) -> None:
    with sock:
        unix_files.bind(sock, Target(str(tmp_path / "a"), 0, 0, 0o600), b"/b")
    assert os.readlink("/proc/self/root") == "/"
    assert threading.active_count() == len(threading.enumerate())


@needs_root
def test_a_dead_socket_is_replaced_and_another_one_is_not_removed(tmp_path: Path, sock: socket.socket) -> None:
    path = tmp_path / "a"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    old = (path.stat().st_dev, path.stat().st_ino)
    with sock:
        new = unix_files.bind(sock, Target(str(path), 0, 0, 0o600), b"/b")
    assert new != old
    unix_files.remove(str(path), old)
    assert path.exists()


@needs_root
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_of_any_type_that_somebody_has_is_left_alone(
    tmp_path: Path, sock: socket.socket, kind: socket.SocketKind
) -> None:
    path = tmp_path / "a"
    with sock, socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            other.listen()
        with pytest.raises(UnixPathError, match="another process listens there") as caught:
            unix_files.bind(sock, Target(str(path), 0, 0, 0o600), b"/b")
        assert caught.value.errno == errno.EADDRINUSE
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


@needs_root
def test_what_takes_the_place_of_a_dead_socket_meanwhile_stays(
    tmp_path: Path, sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_text("somebody's")
    monkeypatch.setattr(unix_files, "_stale", lambda folder, path: (1, 1))
    with sock, pytest.raises(UnixPathError, match="took this path just now"):
        unix_files.bind(sock, Target(str(path), 0, 0, 0o600), b"/b")
    assert path.read_text() == "somebody's"
    monkeypatch.setattr(unix_files, "_stale", lambda folder, path: None)
    with socket.socket(socket.AF_UNIX) as again, pytest.raises(UnixPathError, match="took this path just now"):
        unix_files.bind(again, Target(str(path), 0, 0, 0o600), b"/b")
    assert path.read_text() == "somebody's"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
