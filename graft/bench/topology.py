"""The namespaces of the benchmark, made of nothing but veth pairs and one bridge.

    client ---- veth ---- host ---- bridge ---- container
    10.99.0.2        10.99.0.1   172.30.99.1    172.30.99.2

``host`` plays the machine that Graft runs on, ``client`` the other machine. ``container`` is what a container engine
makes: an address behind a bridge, with destination NAT for what comes in and masquerading for what goes out. The
machine's own network is never touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from graft.bench.own_graft import OwnGraft
from graft.bench.process import joined, run
from graft.bench.scratch import NETNS_DIR, Scratch
from graft.kernel import cgroup

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

NAT_PROGRAM = "nft"
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
    """A named network namespace; ``cgroup`` is where programs that are started in it go."""

    name: str
    cgroup: Path = Path()

    @property
    def path(self) -> Path:
        """Where iproute2 keeps it."""
        return NETNS_DIR / self.name

    def enter(self, *command: str) -> list[str]:
        """``command`` run inside. (`ip netns exec` would hide bpffs, since it mounts a /sys of its own.)"""
        return joined(self.cgroup, self.view(*command))

    def view(self, *command: str) -> list[str]:
        """``command`` run inside, in the caller's cgroup: it only looks, or sets something up."""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def listens(self, port: int, protocol: str = "tcp") -> bool:
        """Whether some socket listens on ``port`` here; of UDP: is bound to it."""
        return bool(run(self.view("ss", "-Hltn" if protocol == "tcp" else "-Haun", f"sport = :{port}")).strip())

    def set(self, sysctls: dict[str, str]) -> None:
        """Write ``sysctls``, named by their path below /proc/sys."""
        lines = [f"echo '{value}' > /proc/sys/{name}" for name, value in sysctls.items()]
        run(self.view("sh", "-ec", "\n".join(lines)))


@dataclass(frozen=True, slots=True)
class Topology:
    """The three namespaces, up and joined, and the Graft whose host is the first."""

    host: Netns
    client: Netns
    container: Netns
    scratch: Scratch
    graft: OwnGraft

    @property
    def cpu_stat(self) -> Path:
        """The file with the CPU time of everything that was started (cgroup-v2.rst, cpu.stat)."""
        return self.scratch.cgroup / "cpu.stat"

    @property
    def programs(self) -> Path:
        """The cgroup of servers, clients and proxies."""
        return self.host.cgroup


@contextmanager
def topology(scratch: Scratch, public: int, inner: int) -> Iterator[Topology]:
    """Build the namespaces, and remove them after. Port ``public`` of the host leads to ``inner`` of the container."""
    programs = scratch.cgroup / "programs"
    cgroup.make(programs)
    with ExitStack() as stack:
        host, client, container = (
            stack.enter_context(named_netns(scratch.netns(role), programs)) for role in ("host", "client", "container")
        )
        graft = stack.enter_context(OwnGraft.apart(scratch, host.path, programs))
        net = Topology(host, client, container, scratch, graft)
        _join_client(net)
        _join_container(net, public, inner)
        yield net


@contextmanager
def named_netns(name: str, programs: Path) -> Iterator[Netns]:
    """Make a namespace of that name with lo up. Removes it after."""
    run(["ip", "netns", "add", name])
    try:
        netns = Netns(name, programs)
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
    if shutil.which(NAT_PROGRAM) is None:
        return
    rules = NAT.format(host=HOST_ADDRESS, container=CONTAINER_ADDRESS, public=public, inner=inner)
    run(host.view(NAT_PROGRAM, rules))
    host.set(CONNTRACK_SYSCTLS)


def _veth(left: Netns, left_name: str, right: Netns, right_name: str) -> None:
    peer = ["peer", "name", right_name, "netns", right.name]
    run(["ip", "-n", left.name, "link", "add", left_name, "type", "veth", *peer])


def _address(netns: Netns, interface: str, address: str) -> None:
    run(["ip", "-n", netns.name, "address", "add", f"{address}/24", "dev", interface])
    run(["ip", "-n", netns.name, "link", "set", interface, "up"])
