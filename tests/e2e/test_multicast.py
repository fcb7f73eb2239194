"""Programs that find each other by multicast: socat under `graft run`, and avahi on the host's network."""

from __future__ import annotations

import socket
import struct
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.shell import Word
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

GROUP, MDNS = "239.1.1.1", "224.0.0.251"
AVAHI = """
[server]
host-name=under-graft
use-ipv6=no
enable-dbus=no
allow-interfaces={interface}
disallow-other-stacks=no
[wide-area]
enable-wide-area=no
[publish]
publish-workstation=no
publish-hinfo=no
[rlimits]
"""


def policy(port: int, group: str, asked: int, transport: str = "born") -> str:
    """One that gives a container that transport, born or swap."""
    return (
        f"name: finder\nendpoints:\n  found: {{address: '0.0.0.0:{port}', protocol: udp, multicast: [{group}]}}\n"
        "  out: 0.0.0.0:dynamic\n"
        f"ingress:\n  - {{bind: '*:{asked}', endpoint: found}}\n"
        f"egress:\n  - {{to: {group}, protocol: udp, endpoint: out}}\n"
        "  - {to: 10.98.0.0/24, protocol: udp, endpoint: out}\n"
        f"default: {'deny' if transport == 'born' else 'container'}\n"
    )


def member(host: Host) -> socket.socket:
    """A socket of the client's that sends to groups on its link, and receives what is sent to GROUP."""
    with host.client.inside():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("", 0))
    sock.settimeout(10 * PATIENCE)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(CLIENT4))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP) + socket.inet_aton(CLIENT4))
    return sock


@pytest.mark.parametrize("transport", ["born", "swap"])
def test_socat_receives_what_is_sent_to_its_group(host: Host, tmp_path: Path, transport: str) -> None:
    port, file = host.port(), tmp_path / "policy.yaml"
    file.write_text(policy(port, GROUP, 5000, transport))
    source = f"UDP4-RECV:5000,ip-add-membership={GROUP}:{HOST4}"
    program = host.start_command([GRAFT, "run", "--policy", file, "--", "socat", "-u", source, "STDOUT"])
    with closing(member(host)) as client:

        def hears() -> bool:
            client.sendto(b"to all\n", (GROUP, port))
            return "to all" in program.said

        program.until("a datagram to the group", hears)
    assert [one["transport"] for one in host.ps()] == [transport]


@pytest.mark.parametrize("transport", ["born", "swap"])
def test_socat_joins_no_other_group(host: Host, tmp_path: Path, transport: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(policy(host.port(), GROUP, 5000, transport))
    source = f"UDP4-RECV:5000,ip-add-membership=239.1.1.2:{HOST4}"
    result = host.graft("run", "--policy", file, "--", "socat", "-u", source, "STDOUT", status=None)
    assert result.returncode and "Operation not permitted" in result.stderr


GROUP6 = "ff15::1:1"
JOINS = """
import socket, struct, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
interface = struct.pack('=I', int(sys.argv[2]))
for call in sys.argv[3:]:
    if call == 'join':
        s.setsockopt(41, 20, socket.inet_pton(socket.AF_INET6, sys.argv[1]) + interface)
    else:
        s.bind(('::', 5000))
print('joined', flush=True); print(s.recv(100).decode(), s.getsockopt(41, 26))
"""


@pytest.mark.parametrize("calls", [("join", "bind"), ("bind", "join")])
def test_an_ipv6_socket_that_is_bound_in_swap_keeps_its_group(
    host: Host, tmp_path: Path, calls: tuple[str, str]
) -> None:
    """Its endpoint is IPv6-only: the socket becomes that, and is not replaced by another one."""
    port, file = host.port(), tmp_path / "policy.yaml"
    file.write_text(
        f"name: finder\nendpoints:\n  found: {{address: '[::]:{port}', protocol: udp, multicast: ['{GROUP6}']}}\n"
        "ingress:\n  - {bind: '*:5000', endpoint: found}\n"
    )
    with host.netns.inside():
        interface = socket.if_nametoindex("eth0")
    words: list[Word] = [*("/usr/bin/python3", "-ISc", JOINS), GROUP6, str(interface), *calls]
    program = host.start_command([GRAFT, "run", "--policy", file, "--", *words])
    program.says("joined")
    assert [one["transport"] for one in host.ps()] == ["swap"]
    with host.client.inside():
        client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        there = socket.if_nametoindex("eth0")
    with closing(client):

        def hears() -> bool:
            client.sendto(b"to all", (GROUP6, port, 0, there))
            return "to all" in program.said

        program.until("a datagram to the group", hears)
    assert program.wait() == 0
    assert program.said.splitlines() == ["joined", "to all 1"]


@pytest.mark.parametrize("transport", ["born", "swap"])
def test_socat_sends_to_its_group(host: Host, tmp_path: Path, transport: str) -> None:
    port, file = host.port(), tmp_path / "policy.yaml"
    file.write_text(policy(port, GROUP, 5000, transport))
    with closing(member(host)) as client:
        to = f"UDP4-DATAGRAM:{GROUP}:{client.getsockname()[1]},ip-multicast-if={HOST4},bind=0.0.0.0:5000"
        host.graft("run", "--policy", file, "--", "sh", "-c", f"echo from socat | socat -u STDIN {to}")
        assert client.recvfrom(100) == (b"from socat\n", (HOST4, port))


def question(name: str) -> bytes:
    """A query for the address of a name (RFC 1035, RFC 6762)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!6H", 0x1234, 0, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)


def test_avahi_answers_queries_of_its_link(host: Host, tmp_path: Path) -> None:
    with host.netns.inside():
        interface = next(name for _, name in socket.if_nameindex() if name != "lo")
    file, settings = tmp_path / "policy.yaml", tmp_path / "avahi.conf"
    file.write_text(policy(5353, MDNS, 5353))
    settings.write_text(AVAHI.format(interface=interface))
    with new_cgroup("avahi") as path, closing(member(host)) as client:
        host.graft("attach", "--cgroup", path, "--policy", file)
        words: list[Word] = ["avahi-daemon", "--no-chroot", "--no-drop-root", "--no-rlimits", "--debug", "-f", settings]
        private: list[Word] = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"]
        program = host.start_command([*in_cgroup(path), *host.netns.command(*private, *words)])
        try:
            program.until("it is up", lambda: "Server startup complete" in program.complained + program.said, 30)

            def answered() -> bytes:
                client.settimeout(1)
                # It names the host's address as its source, which the hooks know once somebody has asked there.
                client.sendto(question("under-graft.local"), (HOST4, 5353))
                client.sendto(question("under-graft.local"), (MDNS, 5353))
                try:
                    return client.recv(1000)
                except TimeoutError:
                    return b""

            assert until("an answer", answered)[-4:] == ip_address(HOST4).packed
        finally:
            program.stop()
            host.remove_at(path)
