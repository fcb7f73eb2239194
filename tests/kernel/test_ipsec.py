"""Datagrams that IPsec puts into others (ESP, alone and in UDP): only their sockets still say where they go."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from graft.model.transport import Transport
from graft.policy.reader import load_policy
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.puppet import puppet
from tests.support.shell import run
from tests.support.wait import until

pytestmark = pytest.mark.kernel

PORT, OTHER_PORT, NAT_PORT = 7777, 7778, 4500
SECURITY = ["proto", "esp", "spi", "0x100", "reqid", "1", "mode", "transport"]
KEYS = ["auth", "hmac(sha256)", "0x" + "11" * 32, "enc", "cbc(aes)", "0x" + "22" * 16]
RULE = f"{{to: {CLIENT4}, ports: [{PORT}], endpoint: out}}"
POLICY = f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\negress: [{RULE}]\ndefault: deny\n"


@pytest.fixture(params=["alone", "in UDP"])
def protected(host: Host, request: pytest.FixtureRequest) -> Iterator[bool]:
    """All that goes to the client by UDP is encrypted; whether that is put into UDP again (RFC 3948)."""
    in_udp = request.param == "in UDP"
    ends = ["src", HOST4, "dst", CLIENT4]
    more = ["encap", "espinudp", str(NAT_PORT), str(NAT_PORT), "0.0.0.0"] if in_udp else []
    made = run(host.netns.command("ip", "xfrm", "state", "add", *ends, *SECURITY, *KEYS, *more))
    if "type not found" in made.stderr:
        pytest.skip("this kernel has no ESP")
    assert made.returncode == 0, made.stderr
    template = ["tmpl", *ends, "proto", "esp", "reqid", "1", "mode", "transport"]
    which = ["src", f"{HOST4}/32", "dst", f"{CLIENT4}/32", "proto", "udp"]
    host.netns.run("ip", "xfrm", "policy", "add", "dir", "out", *which, *template)
    try:
        yield in_udp
    finally:
        host.netns.run("ip", "xfrm", "policy", "flush")
        host.netns.run("ip", "xfrm", "state", "flush")


def sniffer(host: Host, in_udp: bool) -> socket.socket:
    """What comes at the client as it is: encrypted."""
    with host.client.inside():
        if in_udp:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((CLIENT4, NAT_PORT))
        else:
            sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, 50)
    sock.setblocking(False)
    return sock


def received(sock: socket.socket) -> int:
    """How many packets have come."""
    count = 0
    while True:
        try:
            sock.recv(2048)
        except BlockingIOError:
            return count
        count += 1


@pytest.mark.parametrize("is_connected", [False, True], ids=["sendto", "connected"])
def test_what_is_granted_leaves_encrypted(host: Host, protected: bool, is_connected: bool) -> None:
    graft = host.installation
    compiled = graft.compile(load_policy(POLICY, "policy"))
    with new_cgroup("ipsec") as path, puppet(path, host.netns.path) as process:
        with graft.transaction() as change:
            change.containers.create(compiled, path, host.netns.cookie, Transport.DIRECT)
        with closing(sniffer(host, protected)) as far:
            if is_connected:
                sock = process.socket("udp")
                assert process.say("connect", sock, CLIENT4, PORT) == "ok"
                assert process.say("send", sock) == "ok"
            else:
                assert process.sendto(CLIENT4, OTHER_PORT) == "EACCES"
                assert process.sendto(CLIENT4, PORT) == "ok"
            until("it comes", lambda: received(far))
        host.remove_at(path)
