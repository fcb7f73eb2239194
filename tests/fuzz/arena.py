"""Where sequences run: a host with Graft, a far end that answers, a container of one transport, and the operator.

The operator uses Graft (its library, which is what the command line calls); nothing else here does.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graft.commands.policy_apply import apply
from graft.commands.policy_source import policy_of
from graft.errors import GraftError
from graft.model.endpoint import parse_endpoint
from tests.fuzz.generate import FOREIGN, OTHER4, OTHER6, SERVED
from tests.fuzz.model import Change, Egress, Policy, Transport, World
from tests.fuzz.seen import Timeline
from tests.support.building import Programs
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6, Netns, namespace
from tests.support.shell import AS_NOBODY
from tests.support.wait import PATIENCE, until

_FOR_UDP = Egress("192.0.2.1/32", (9,), "for-udp", "udp")
LOOPBACK4_IPV6 = "127.0.0.6"
"""The address from which a connected IPv6 socket sends to an IPv4-mapped address (include/net/ipv6.h)."""


class FarEnd:
    """Listeners and datagram sockets of the client, which accept and receive everything."""

    def __init__(self, client: Netns) -> None:
        self._sockets = []
        for address in (CLIENT4, CLIENT6):
            for port in (*SERVED, *FOREIGN):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    with client.inside():
                        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    made.setblocking(False)
                    made.bind((address, port))
                    if kind == socket.SOCK_STREAM:
                        made.listen(1024)
                    self._sockets.append(made)

    def clear(self) -> None:
        """Drop what has arrived."""
        for one in self._sockets:
            with contextlib.suppress(OSError):
                while True:
                    one.accept()[0].close() if one.type == socket.SOCK_STREAM else one.recv(64)

    def close(self) -> None:
        """No more."""
        for one in self._sockets:
            one.close()


class Player:
    """fuzzing.c, running in a container: lines there, lines back."""

    def __init__(self, process: subprocess.Popen[bytes], complaints: Path) -> None:
        self.process, self._complaints = process, complaints
        self._rest = b""

    def say(self, *lines: str) -> None:
        """Write lines to it."""
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.flush()

    def until(self, last: str, seconds: float = 30) -> list[str]:
        """Its lines up to one that begins with ``last``, that one included."""
        said: list[str] = []
        end = time.monotonic() + seconds * PATIENCE
        while not said or not said[-1].startswith(last):
            said.append(self._line(end))
            assert last == "ended" or said[-1] != "ended", "the sequence did not end in time, or was killed"
        return said

    def _line(self, end: float) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            assert data, f"the program says no more: {self._complaints.read_text()}"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(10 * PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@dataclass
class Operator:
    """Changes endpoints and one container's policy, and records what was in force when."""

    host: Host
    cgroup: Path
    folder: Path
    world: World
    timeline: Timeline = field(default_factory=Timeline)
    changes: int = 0
    refused: int = 0

    def make(self, change: Change) -> None:
        """One change. What Graft refuses has changed nothing."""
        after = change.of(self.world)
        self.timeline.begin(after, time.time_ns())
        try:
            self._do(change)
        except GraftError:
            self.timeline.failed()
            self.refused += 1
            return
        self.timeline.replaced(time.time_ns())
        self.world = after
        self.changes += 1

    def become(self, world: World) -> None:
        """Make the changes that lead to this world; a new timeline begins then."""
        self._make_endpoints_of(world)
        self._apply(world.policy)
        self.world = world
        self.timeline = Timeline()
        self.timeline.begin(world, time.time_ns())

    def _make_endpoints_of(self, world: World) -> None:
        for one in self.world.endpoints:
            if world.endpoint(one.name) is None:
                self._do(Change("delete", name=one.name))
        for one in world.endpoints:
            there = self.world.endpoint(one.name)
            if there != one:
                kind = "move" if there is not None and (":" in there.address) == (":" in one.address) else "add"
                if there is not None and kind == "add":
                    self._do(Change("delete", name=one.name))
                self._do(Change(kind, endpoint=one))  # type: ignore[arg-type]

    def _do(self, change: Change) -> None:
        if change.kind == "apply":
            self._apply(change.policy or Policy())
            return
        with self.host.installation as graft, graft.transaction() as under_lock:
            if change.kind == "delete":
                under_lock.endpoints.delete(change.name, force=True)
            elif change.endpoint is not None:
                one = change.endpoint
                made = parse_endpoint(one.name, one.spec, one.protocol, dual_stack=one.dual_stack)
                (under_lock.endpoints.add if change.kind == "add" else under_lock.endpoints.change)(made)

    def _apply(self, policy: Policy) -> None:
        file = write_policy(self.folder, policy)
        with self.host.installation as graft:
            apply(graft, policy_of(graft.settings, "", file, (), ()), str(self.cgroup))


def write_policy(folder: Path, policy: Policy, name: str = "fuzz.yaml") -> Path:
    """The policy's file."""
    file = folder / name
    file.write_text(policy.text())
    return file


@dataclass(frozen=True, slots=True)
class Arena:
    """A container under a policy, with a program in it that waits for calls."""

    transport: Transport
    host: Host
    far: FarEnd
    player: Player
    operator: Operator


SETTINGS = {
    "net.ipv4.ping_group_range": "0 2147483647",
    "net.ipv4.ip_local_port_range": "32768 60999",
    "net.ipv4.tcp_fastopen": "3",
    "net.ipv6.auto_flowlabels": "0",
    # What a sequence closes must not keep its port from the next one for a minute.
    "net.ipv4.tcp_max_tw_buckets": "0",
}


@contextmanager
def prepared(host: Host) -> Iterator[None]:
    """Addresses, neighbours and, for the time of the block, settings that the sequences count on."""
    netns, client = host.netns, host.client
    before = {name: netns.run("sysctl", "-n", name).strip() for name in SETTINGS}
    netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    netns.run("ip", "address", "replace", f"{OTHER6}/128", "dev", "lo", "nodad")
    netns.run("sysctl", "-qw", *(f"{name}={value}" for name, value in SETTINGS.items()))
    # A packet that waits for its neighbour's address would leave after the call that sent it.
    for one, other, addresses in ((netns, client, (CLIENT4, CLIENT6)), (client, netns, (HOST4, HOST6))):
        words = other.run("ip", "-o", "link", "show", "eth0").split()
        hardware = words[words.index("link/ether") + 1]
        for address in addresses:
            one.run("ip", "neighbour", "replace", address, "lladdr", hardware, "dev", "eth0", "nud", "permanent")
    try:
        yield
    finally:
        netns.run("sysctl", "-qw", *(f"{name}={value}" for name, value in before.items()))


def addresses(netns: Netns) -> frozenset[str]:
    """All addresses of a namespace, link-local ones too, and the one that the kernel uses by itself."""
    lines = netns.run("ip", "-o", "address", "show").splitlines()
    return frozenset(line.split()[3].partition("/")[0] for line in lines) | {LOOPBACK4_IPV6}


@contextmanager
def arena(host: Host, transport: Transport, world: World, programs: Programs, folder: Path) -> Iterator[Arena]:
    """A container of that transport. Nothing of it is left afterwards."""
    with ExitStack() as stack:
        stack.enter_context(prepared(host))
        far = FarEnd(host.client)
        stack.callback(far.close)
        host.forget_endpoints()
        stack.callback(host.forget_endpoints)
        with host.installation.transaction() as change:
            for one in world.endpoints:
                change.endpoints.add(parse_endpoint(one.name, one.spec, one.protocol, dual_stack=one.dual_stack))
        program = programs["fuzzing"]
        if transport in ("swap", "born"):
            # Which of the two serves is decided by the first policy; swap has to do with all that follow. So is whether
            # UDP sockets are born on the host's stack.
            first = Policy() if transport == "born" else Policy(egress=(_FOR_UDP,), connect="container")
            with host.installation.transaction() as change:
                change.endpoints.add(parse_endpoint("for-udp", "0.0.0.0:dynamic", "udp"))
            # In a file of its own: `graft run` ends a program whose policy's file changes while it starts.
            player, path = _run(host, write_policy(folder, first, "first.yaml"), program, folder, stack)
            host.graft("policy", "apply", "--cgroup", path, write_policy(folder, world.policy))
            with host.installation.transaction() as change:
                change.endpoints.delete("for-udp", force=False)
        else:
            policy = write_policy(folder, world.policy)
            player, path = _attached(host, policy, program, folder, stack, transport == "splice")
        yield Arena(transport, host, far, player, Operator(host, path, folder, world))


def ferry_ports(host: Host) -> frozenset[int]:
    """The ports at which Graft's own processes carry datagrams between the host's stack and a container's."""
    return frozenset(port for _, one in host.maps.ferries.items() for port in (one.port, *one.ports6) if port)


def _start(command: list[str], host: Host, folder: Path) -> Player:
    complaints = Path(tempfile.mkstemp(dir=folder, suffix=".err")[1])
    with complaints.open("wb") as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=err,
            env={**os.environ, **host.environment},
            start_new_session=True,
        )
    return Player(process, complaints)


def _run(host: Host, policy: Path, program: Path, folder: Path, stack: ExitStack) -> tuple[Player, Path]:
    command = [str(GRAFT), "run", "--policy", str(policy), "--user", "nobody", "--", str(program)]
    player = _start(command, host, folder)
    stack.callback(player.stop)

    def found() -> str:
        return next((one.cgroup for one in host.installation.containers.listing() if one.pid == player.process.pid), "")

    return player, Path(until("the container", found))


def _attached(
    host: Host, policy: Path, program: Path, folder: Path, stack: ExitStack, apart: bool
) -> tuple[Player, Path]:
    """A program that runs without Graft, in the host's namespace or one of its own, and then comes under a policy."""
    path = stack.enter_context(new_cgroup("fuzz"))
    netns = stack.enter_context(namespace("fuzz")) if apart else host.netns
    if apart:
        netns.run("sysctl", "-qw", "net.ipv4.ip_unprivileged_port_start=0")
    player = _start([*in_cgroup(path), *netns.command(*AS_NOBODY, program)], host, folder)
    stack.callback(player.stop)
    player.say("begin", "end")  # it is in its cgroup by now
    player.until("ended")
    host.graft("attach", "--cgroup", path, "--policy", policy)
    stack.callback(lambda: host.graft("detach", "--cgroup", path, status=None))
    return player, path
