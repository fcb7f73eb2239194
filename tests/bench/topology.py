"""The namespaces of the benchmark, made of nothing but veth pairs and one bridge.

    client ---- veth ---- host ---- bridge ---- container
    10.99.0.2        10.99.0.1   172.30.99.1    172.30.99.2

``host`` plays the machine that Graft runs on, ``client`` the other machine. ``container`` is what a container engine
makes: an address behind a bridge, with destination NAT for what comes in and masquerading for what goes out. The
machine's own network is never touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.process import run

NETNS_DIR = Path("/run/netns")
PREFIX = "graftbench"

HOST_ADDRESS = "10.99.0.1"
CLIENT_ADDRESS = "10.99.0.2"
BRIDGE_ADDRESS = "172.30.99.1"
CONTAINER_ADDRESS = "172.30.99.2"
HOST_INTERFACE = "cl0"
"""The host's, towards the client."""

# The same in every namespace. Thousands of connections a second would use up the ports of one address in TIME_WAIT; the
# lower ports are left to servers. Congestion control is one that every namespace may have and that paces nothing, like
# the kernel's default, cubic: where a machine's is BBR, its timers cost each sender, and a relay is one more of them.
SYSCTLS = {
    "net/ipv4/ip_local_port_range": "10240 65535",
    "net/ipv4/tcp_tw_reuse": "1",
    "net/ipv4/tcp_congestion_control": "reno",
}

# The limit of connections that NAT remembers is the machine's, whatever the namespace: it must not fill up with closed
# ones (the default keeps each for 120 s).
CONNTRACK_SYSCTLS = {
    "net/netfilter/nf_conntrack_tcp_timeout_time_wait": "1",
    "net/netfilter/nf_conntrack_tcp_timeout_close": "1",
}

NAT = """
table ip bench {{
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr {host} tcp dport {public} dnat to {container}:{inner}
        ip daddr {host} udp dport {public} dnat to {container}:{inner}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {container} oifname != "br0" masquerade
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Netns:
    """A named network namespace."""

    name: str

    @property
    def path(self) -> Path:
        """Where iproute2 keeps it."""
        return NETNS_DIR / self.name

    def enter(self, *command: str) -> list[str]:
        """``command`` run inside. (`ip netns exec` would hide bpffs, since it mounts a /sys of its own.)"""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def listens(self, port: int, protocol: str = "tcp") -> bool:
        """Whether some socket listens on ``port`` here; of UDP: is bound to it."""
        return bool(run(self.enter("ss", "-Hltn" if protocol == "tcp" else "-Haun", f"sport = :{port}")).strip())

    def set(self, sysctls: dict[str, str]) -> None:
        """Write ``sysctls``, named by their path below /proc/sys."""
        lines = [f"echo '{value}' > /proc/sys/{name}" for name, value in sysctls.items()]
        run(self.enter("sh", "-ec", "\n".join(lines)))


@dataclass(frozen=True, slots=True)
class Topology:
    """The three namespaces, up and joined."""

    host: Netns
    client: Netns
    container: Netns


@contextmanager
def topology(public: int, inner: int) -> Iterator[Topology]:
    """Build the namespaces, and remove them after. Port ``public`` of the host leads to ``inner`` of the container."""
    sweep()
    with ExitStack() as stack:
        made = [
            stack.enter_context(named_netns(f"{PREFIX}-{os.getpid()}-{role}"))
            for role in ("host", "client", "container")
        ]
        net = Topology(*made)
        _join_client(net)
        _join_container(net, public, inner)
        yield net


def sweep() -> None:
    """Remove the namespaces of runs that were killed before they could."""
    for path in NETNS_DIR.glob(f"{PREFIX}-*"):
        found = re.fullmatch(rf"{PREFIX}-(\d+)-\w+", path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            run(["ip", "netns", "del", path.name])


@contextmanager
def named_netns(name: str) -> Iterator[Netns]:
    """Make a namespace of that name with lo up. Removes it after."""
    run(["ip", "netns", "add", name])
    try:
        netns = Netns(name)
        run(["ip", "-n", name, "link", "set", "lo", "up"])
        netns.set(SYSCTLS)
        yield netns
    finally:
        run(["ip", "netns", "del", name])


def _join_client(net: Topology) -> None:
    _veth(net.host, HOST_INTERFACE, net.client, "eth0")
    _address(net.host, HOST_INTERFACE, HOST_ADDRESS)
    _address(net.client, "eth0", CLIENT_ADDRESS)


def _join_container(net: Topology, public: int, inner: int) -> None:
    host, container = net.host, net.container
    _veth(host, "ct0", container, "eth0")
    run(["ip", "-n", host.name, "link", "add", "br0", "type", "bridge"])
    run(["ip", "-n", host.name, "link", "set", "ct0", "master", "br0", "up"])
    _address(host, "br0", BRIDGE_ADDRESS)
    _address(container, "eth0", CONTAINER_ADDRESS)
    run(["ip", "-n", container.name, "route", "add", "default", "via", BRIDGE_ADDRESS])
    host.set({"net/ipv4/ip_forward": "1"})
    rules = NAT.format(host=HOST_ADDRESS, container=CONTAINER_ADDRESS, public=public, inner=inner)
    run(host.enter("nft", rules))
    host.set(CONNTRACK_SYSCTLS)


def _veth(left: Netns, left_name: str, right: Netns, right_name: str) -> None:
    peer = ["peer", "name", right_name, "netns", right.name]
    run(["ip", "-n", left.name, "link", "add", left_name, "type", "veth", *peer])


def _address(netns: Netns, interface: str, address: str) -> None:
    run(["ip", "-n", netns.name, "address", "add", f"{address}/24", "dev", interface])
    run(["ip", "-n", netns.name, "link", "set", interface, "up"])
