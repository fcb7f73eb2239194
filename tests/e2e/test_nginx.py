"""nginx, unchanged, in a namespace that has only loopback, served by the host's stack."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.nginx import nginx
from tests.support.program import Program
from tests.support.shell import output
from tests.support.wait import until

pytestmark = pytest.mark.e2e


@pytest.fixture(params=["swap", "born"])
def host(host: Host, request: pytest.FixtureRequest) -> Host:
    """The host, where every `graft run` has that transport."""
    return host.with_transport(request.param)


def test_nginx_on_port_80_of_its_namespace_answers_on_the_endpoint(host: Host, tmp_path: Path) -> None:
    port = host.port()
    nginx(host, tmp_path, ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"], "0.0.0.0:80")
    port_seen, server, peer = host.client.fetch(HOST4, port).split()
    assert (port_seen, server, peer) == ("80", HOST4, CLIENT4)


def test_nginx_is_reached_over_ipv6(host: Host, tmp_path: Path) -> None:
    port = host.port()
    nginx(host, tmp_path, ["-i", f"[::]:80={host.endpoint(f'[::]:{port}')}"], "[::]:80 ipv6only=on")
    assert host.client.fetch(HOST6, port).split() == ["80", HOST6, CLIENT6]


def test_a_dual_stack_listener_is_served_by_an_ipv4_endpoint(host: Host, tmp_path: Path) -> None:
    port = host.port()
    nginx(host, tmp_path, ["-i", f"*:80={host.endpoint(f'0.0.0.0:{port}')}"], "[::]:80 ipv6only=off")
    seen, server, peer = host.client.fetch(HOST4, port).split()
    assert (seen, server, peer) == ("80", f"::ffff:{HOST4}", f"::ffff:{CLIENT4}")


def test_a_dual_stack_listener_on_an_ipv6_endpoint_serves_both_families(host: Host, tmp_path: Path) -> None:
    port = host.port()
    nginx(host, tmp_path, ["-i", f"*:80={host.endpoint(f'[::]:{port}', dual_stack=True)}"], "[::]:80 ipv6only=off")
    assert host.client.fetch(HOST4, port).split()[2] == f"::ffff:{CLIENT4}"
    assert host.client.fetch(HOST6, port).split() == ["80", HOST6, CLIENT6]


def test_two_containers_both_have_port_80(host: Host, tmp_path: Path) -> None:
    ports = [host.port(), host.port()]
    for number, port in enumerate(ports):
        folder = tmp_path / str(number)
        folder.mkdir()
        nginx(host, folder, ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"], "0.0.0.0:80", said=f"n{number}")
    answers = [host.client.fetch(HOST4, port).split() for port in ports]
    assert [answer[-1] for answer in answers] == ["n0", "n1"]
    assert {answer[0] for answer in answers} == {"80"}


def inside(program: Program, *command: str) -> str:
    """A command's output in the namespace of a container's processes."""
    child = program.child()
    return output(["nsenter", f"--net=/proc/{child}/ns/net", "--", *command])


def test_the_listener_is_the_hosts_and_its_namespace_has_none(host: Host, tmp_path: Path) -> None:
    port = host.port()
    program = nginx(host, tmp_path, ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"], "0.0.0.0:80")
    assert "nginx" in host.netns.sockets("state", "listening", f"sport = :{port}")
    assert inside(program, "ss", "-Htanu") == ""
    links = inside(program, "ip", "-o", "link").splitlines()
    assert len(links) == 1 and " lo:" in links[0]


def test_packets_pass_the_hosts_interface_and_never_the_containers_loopback(host: Host, tmp_path: Path) -> None:
    port = host.port()
    program = nginx(host, tmp_path, ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"], "0.0.0.0:80")
    with (
        Capture(host.netns.path, "eth0") as outside,
        Capture(Path(f"/proc/{program.child()}/ns/net"), "lo") as loopback,
    ):
        assert host.client.fetch(HOST4, port).split()[0] == "80"
        before = list(loopback.packets)
        inside(program, "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9 || true")  # a packet that the capture must show
        until("a packet on the container's loopback", lambda: loopback.packets)
    ports = {packet[key] for packet in outside.packets for key in ("sport", "dport")}
    assert port in ports and 80 not in ports
    peers = {packet[key] for packet in outside.packets for key in ("src", "dst")}
    assert peers == {HOST4, CLIENT4}
    assert before == []


class Capture:
    """The TCP packets on an interface of a namespace while the block runs."""

    def __init__(self, netns: Path, interface: str) -> None:
        from scapy.config import conf
        from scapy.layers.inet import IP, TCP
        from scapy.layers.inet6 import IPv6
        from scapy.sendrecv import AsyncSniffer

        from graft.kernel import netns as namespaces

        self._ip, self._tcp, self._ip6 = IP, TCP, IPv6
        self.packets: list[dict[str, object]] = []
        started = threading.Event()
        with namespaces.entered(netns):
            conf.ifaces.reload()
            raw = conf.L2listen(iface=interface)
        self._sniffer = AsyncSniffer(opened_socket=raw, prn=self._saw, store=False, started_callback=started.set)
        self._started, self._raw = started, raw

    def _saw(self, packet) -> None:  # type: ignore[no-untyped-def]
        ip = packet.getlayer(self._ip) or packet.getlayer(self._ip6)
        if ip is not None and self._tcp in packet:
            tcp = packet[self._tcp]
            self.packets.append({"src": ip.src, "dst": ip.dst, "sport": tcp.sport, "dport": tcp.dport})

    def __enter__(self) -> Capture:
        self._sniffer.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._sniffer.stop()
        self._raw.close()


def test_a_worker_process_of_another_user_accepts_the_connections(host: Host, tmp_path: Path) -> None:
    port = host.port()
    program = nginx(host, tmp_path, ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"], "0.0.0.0:80", workers=2)
    assert [host.client.fetch(HOST4, port).split()[0] for _ in range(5)] == ["80"] * 5
    users = subprocess.run(["ps", "-o", "user=", "--ppid", str(program.child())], capture_output=True, text=True)
    assert len(users.stdout.split()) == 2
    assert "root" not in users.stdout


def test_nginx_as_a_proxy_reaches_its_upstream_through_the_hosts_stack(host: Host, tmp_path: Path) -> None:
    port, upstream = host.port(), host.port()
    listener = host.client.listener("0.0.0.0", upstream)
    seen: list[str] = []

    def serve() -> None:
        for _ in range(3):
            peer, address = listener.accept()
            with peer:
                seen.append(address[0])
                peer.recv(4096)
                peer.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\nupstream")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    rules = [
        "-i",
        f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}",
        "-e",
        f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}",
    ]
    nginx(host, tmp_path, rules, "0.0.0.0:80", location=f"proxy_pass http://{CLIENT4}:{upstream};")
    assert [host.client.fetch(HOST4, port) for _ in range(3)] == ["upstream"] * 3
    thread.join(10)
    listener.close()
    assert seen == [HOST4] * 3
