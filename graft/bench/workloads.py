"""What is measured. Each workload starts a server in one place and a client in the other, and gives its numbers.

A new workload is one more class and one more line in ``WORKLOADS``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Protocol

from graft.bench.cases import Case, Server
from graft.bench.outputs import PERCENTILES, WRK_SCRIPT, Rounds, cpu_usec, received_bytes, rounds_of
from graft.bench.process import kept, run, wait_until
from graft.bench.report import Kind, Metric
from graft.bench.topology import CLIENT_ADDRESS, HOST_ADDRESS, Topology

PEER = Path(__file__).with_name("graft-peer")
"""Built from compiled/peer.c where there was a compiler when Graft was installed."""

# Connections at once for wrk, which has one thread: enough to keep one nginx worker busy, few enough to fit its core.
CONNECTIONS = 32

# Of connects a count, not seconds: every connect leaves a port in TIME_WAIT for a minute in the namespace where it was
# made. Each measurement has a server port of its own as well, so that it does not search among the ports that the one
# before it left there (two cases share the host's namespace).
CONNECTS_A_SECOND = 5000
FEWEST_CONNECTS, MOST_CONNECTS = 5000, 10000
"""More than a listener's backlog: a relay could take so many at once, and do its work after the measurement."""
CLIENT_PORTS = range(9000, 9500)
"""Below those that the client's own connections have (topology.py)."""

# How much longer than the measured time a client may take: to start, and to wait for what is slow.
PATIENCE = 30.0

NGINX_CONF = """
daemon off;
worker_processes 1;
user root;
pid {folder}/nginx-{port}.pid;
error_log {folder}/nginx-{port}.log error;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    server {{
        listen 0.0.0.0:{port};
        location / {{ return 200 "ok\\n"; }}
    }}
}}
"""

Figures = dict[str, float]
"""Numbers by the name of their metric."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a measurement has at hand, and how long it takes."""

    net: Topology
    seconds: float

    @property
    def folder(self) -> Path:
        """For files."""
        return self.net.scratch.folder

    @property
    def connects(self) -> int:
        """How many connects a measurement makes."""
        return min(MOST_CONNECTS, max(FEWEST_CONNECTS, round(CONNECTS_A_SECOND * self.seconds)))

    def peer(self, *arguments: str) -> list[str]:
        """The client of peer.c, which reads the CPU time as well."""
        return [str(PEER), *arguments, str(self.net.cpu_stat)]


class Workload(Protocol):
    """One thing to measure."""

    @property
    def metric(self) -> Metric:
        """Its main number, by whose name it is chosen."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All its numbers, the main one first."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The programs that it takes."""

    def measure(self, case: Case, place: Place) -> Figures:
        """One measurement. Raises NotOffered, and BenchError where a program fails."""


def missing(programs: Sequence[str]) -> str | None:
    """Why what takes these ``programs`` cannot be measured on this machine; None if it can."""
    for program in programs:
        if shutil.which(program) is None:
            return "no C compiler when Graft was installed" if program == str(PEER) else f"{program} is not installed"
    return None


def latencies(metric: Metric, of: str) -> tuple[Metric, ...]:
    """The percentiles of a round."""
    return tuple(
        Metric(f"{metric.name}-{name}", f"{of}, {name}", "us", 1, more_is_better=False, kind=Kind.LATENCY)
        for name in PERCENTILES
    )


def cpu(metric: Metric, of: str, digits: int = 1) -> Metric:
    """The CPU time of a round."""
    return Metric(f"{metric.name}-cpu", of, "us", digits, more_is_better=False, kind=Kind.CPU)


def figures(metric: Metric, value: float, rounds: Rounds) -> Figures:
    """The main number with the percentiles and the CPU time of a round."""
    found = {metric.name: value, f"{metric.name}-cpu": rounds.cpu}
    return found | {f"{metric.name}-{name}": us for name, us in rounds.percentiles.items()}


@dataclass(frozen=True, slots=True)
class Http:
    """wrk to one nginx worker with an answer of three bytes."""

    metric: Metric
    headers: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("wrk", "nginx")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Requests a second, and of one request the percentiles and the CPU time."""
        of = f"{self.metric.title}, 32 at once"
        return (self.metric, *latencies(self.metric, of), cpu(self.metric, f"{self.metric.title}, a request"))

    def measure(self, case: Case, place: Place) -> Figures:
        """Requests a second, with what belongs to them."""
        script = place.folder / "wrk.lua"
        script.write_text(WRK_SCRIPT.format(cpu_stat=place.net.cpu_stat))
        with case.serve(place.net, _nginx(place.folder)) as port:
            duration = f"{max(1, round(place.seconds))}s"
            headers = [part for header in self.headers for part in ("-H", header)]
            url = f"http://{HOST_ADDRESS}:{port}/"
            wrk = ["wrk", "-t1", f"-c{CONNECTIONS}", "-d", duration, "-s", str(script), *headers, url]
            rounds = rounds_of(run(place.net.client.enter(*wrk), place.seconds + PATIENCE))
            return figures(self.metric, rounds.rate, rounds)


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """64 bytes there and back, one at a time: on one connection, with one for each, or in datagrams."""

    metric: Metric
    server: str
    """What peer.c serves."""
    of: str
    protocol: str = "tcp"
    from_median: bool = True
    """Whether the rate is that of the median round: a busy machine then changes it less."""
    needs: tuple[str, ...] = (str(PEER),)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Rounds a second, and of one round the percentiles and the CPU time."""
        return (self.metric, *latencies(self.metric, self.of), cpu(self.metric, self.of))

    def measure(self, case: Case, place: Place) -> Figures:
        """Rounds a second, with what belongs to them."""
        server = Server(lambda port: [str(PEER), self.server, str(port)], self.protocol)
        with case.serve(place.net, server) as port:
            command = place.peer(self.metric.name, HOST_ADDRESS, str(port), str(place.seconds))
            rounds = rounds_of(run(place.net.client.enter(*command), place.seconds + PATIENCE))
            rate = 1e6 / rounds.percentiles["p50"] if self.from_median else rounds.rate
            return figures(self.metric, rate, rounds)


@dataclass(frozen=True, slots=True)
class Packets:
    """64 bytes there and back by UDP, 32 datagrams under way."""

    metric: Metric
    needs: tuple[str, ...] = (str(PEER),)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Answers a second, and the CPU time of one."""
        return (self.metric, cpu(self.metric, "UDP, 32 under way, a datagram and its answer"))

    def measure(self, case: Case, place: Place) -> Figures:
        """Answers a second, and the CPU time of one."""
        with case.serve(place.net, Server(lambda port: [str(PEER), "udp-serve", str(port)], "udp")) as port:
            command = place.peer(self.metric.name, HOST_ADDRESS, str(port), str(place.seconds))
            rounds = rounds_of(run(place.net.client.enter(*command), place.seconds + PATIENCE))
            return {self.metric.name: rounds.rate, f"{self.metric.name}-cpu": rounds.cpu}


@dataclass(frozen=True, slots=True)
class Bulk:
    """One TCP stream of iperf3."""

    metric: Metric
    outward: bool
    needs: tuple[str, ...] = ("iperf3",)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The throughput, and the CPU time of a megabyte."""
        return (self.metric, cpu(self.metric, f"{self.metric.title}, a megabyte", 0))

    def measure(self, case: Case, place: Place) -> Figures:
        """Gigabits a second that arrived, and the CPU time of a megabyte; the start of iperf3 is in it."""
        with case.serve(place.net, Server(lambda port: ["iperf3", "-s", "-1", "-p", str(port)])) as port:
            direction = ["-R"] if self.outward else []
            command = ["iperf3", "-J", "-c", HOST_ADDRESS, "-p", str(port), "-t", str(max(1, round(place.seconds)))]
            before = cpu_usec(place.net.cpu_stat.read_text())
            output = run(place.net.client.enter(*command, *direction), place.seconds + PATIENCE)
            used = cpu_usec(place.net.cpu_stat.read_text()) - before
            size, bits = received_bytes(output)
            return {self.metric.name: bits / 1e9, f"{self.metric.name}-cpu": used / (size / 1e6)}


@dataclass(frozen=True, slots=True)
class Connect:
    """The program in the container opens connections to a server on the client's side, and closes them."""

    metric: Metric
    ports: Iterator[int] = field(default_factory=lambda: cycle(CLIENT_PORTS))
    needs: tuple[str, ...] = (str(PEER),)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The mean of a cycle, its percentiles and its CPU time."""
        of = "connect + close"
        return (self.metric, *latencies(self.metric, of), cpu(self.metric, of))

    def measure(self, case: Case, place: Place) -> Figures:
        """Microseconds for socket, connect and close: the mean of one run.

        A median would not see what one call in eight, or sixteen, pays for the others.
        """
        client, port = place.net.client, next(self.ports)
        with kept(client.enter(str(PEER), "serve", str(port))) as server:
            wait_until("listening", lambda: client.listens(port), server)
            command = place.peer("connect", CLIENT_ADDRESS, str(port), str(place.connects))
            rounds = rounds_of(case.reach_out(place.net, command, timeout=2 * PATIENCE))
            return figures(self.metric, rounds.mean, rounds)


def _nginx(folder: Path) -> Server:
    def command(port: int) -> list[str]:
        conf = folder / f"nginx-{port}.conf"
        conf.write_text(NGINX_CONF.format(folder=folder, port=port))
        return ["nginx", "-c", str(conf), "-p", str(folder), "-e", str(folder / "nginx.log")]

    return Server(command)


_PINGPONG = Metric("pingpong", "TCP ping-pong, 64 bytes", "round trips/s")
_ACCEPT = Metric("accept", "TCP, a connection a round trip", "connections/s")
_UDP_PINGPONG = Metric("udp-pingpong", "UDP ping-pong, 64 bytes", "round trips/s")

WORKLOADS: tuple[Workload, ...] = (
    Http(Metric("keepalive", "HTTP, keep-alive", "requests/s")),
    Http(Metric("request", "HTTP, a connection a request", "requests/s"), ("Connection: close",)),
    RoundTrips(_PINGPONG, "serve", "TCP ping-pong"),
    RoundTrips(_ACCEPT, "serve", "TCP, connection and round trip", from_median=False),
    Bulk(Metric("bulk-in", "bulk TCP to the program", "Gb/s", digits=1), outward=False),
    Bulk(Metric("bulk-out", "bulk TCP from the program", "Gb/s", digits=1), outward=True),
    RoundTrips(_UDP_PINGPONG, "udp-serve", "UDP ping-pong", "udp"),
    Packets(Metric("udp-packets", "UDP, 32 datagrams under way", "answers/s")),
    Connect(Metric("connect", "connect + close by the program", "us", digits=1, more_is_better=False)),
)
