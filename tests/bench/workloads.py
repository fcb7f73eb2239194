"""What is measured. Each workload starts a server in one place and a client in the other, and gives one number.

A new workload is one more class and one more line in ``WORKLOADS``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol

from tests.bench.cases import Case, Server
from tests.bench.process import BenchError, kept, run, wait_until
from tests.bench.report import Metric
from tests.bench.topology import CLIENT_ADDRESS, HOST_ADDRESS, Topology

# Connections at once for wrk, which has one thread: enough to keep one nginx worker busy, few enough to fit its core.
CONNECTIONS = 32

# A count, not seconds: every connect leaves a port in TIME_WAIT for a minute in the namespace where it was made. Each
# measurement has a server port of its own as well, so that it does not search among the ports that the one before it
# left there (two cases share the host's namespace).
CONNECTS = 10000
FIRST_CLIENT_PORT = 9000

NGINX_CONF = """
daemon off;
worker_processes 1;
user root;
pid {workdir}/nginx-{port}.pid;
error_log {workdir}/nginx-{port}.log error;
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


@dataclass(frozen=True, slots=True)
class Place:
    """What a measurement has at hand."""

    net: Topology
    workdir: Path
    peer: Path
    seconds: float


class Workload(Protocol):
    """One thing to measure."""

    @property
    def metric(self) -> Metric:
        """Its name, its unit, and whether more is better."""

    def measure(self, case: Case, place: Place) -> float:
        """One measurement. Raises BenchError where a program fails."""


@dataclass(frozen=True, slots=True)
class Http:
    """wrk to one nginx worker with an answer of three bytes."""

    metric: Metric
    headers: tuple[str, ...] = ()

    def measure(self, case: Case, place: Place) -> float:
        """Requests a second."""
        with case.serve(place.net, _nginx(place.workdir)) as port:
            duration = f"{max(1, round(place.seconds))}s"
            headers = [part for header in self.headers for part in ("-H", header)]
            url = f"http://{HOST_ADDRESS}:{port}/"
            wrk = ["wrk", "-t1", f"-c{CONNECTIONS}", "-d", duration, *headers, url]
            return requests_per_second(run(place.net.client.enter(*wrk), place.seconds + 30))


@dataclass(frozen=True, slots=True)
class PingPong:
    """64 bytes there and back, one at a time, on one connection."""

    metric: Metric

    def measure(self, case: Case, place: Place) -> float:
        """Round trips a second, taken from the median of one."""
        with case.serve(place.net, Server(lambda port: [str(place.peer), "serve", str(port)])) as port:
            command = [str(place.peer), "pingpong", HOST_ADDRESS, str(port), str(place.seconds)]
            return 1e6 / median_us(run(place.net.client.enter(*command), place.seconds + 30))


@dataclass(frozen=True, slots=True)
class Datagrams:
    """64 bytes there and back by UDP, one at a time (`udp-pingpong` of peer.c) or several (`udp-packets`)."""

    metric: Metric

    def measure(self, case: Case, place: Place) -> float:
        """Datagrams a second that were answered: of one at a time from the median of a round trip, of several all."""
        server = Server(lambda port: [str(place.peer), "udp-serve", str(port)], "udp")
        with case.serve(place.net, server) as port:
            command = [str(place.peer), self.metric.name, HOST_ADDRESS, str(port), str(place.seconds)]
            output = run(place.net.client.enter(*command), place.seconds + 30)
            return 1e6 / median_us(output) if self.metric.name == "udp-pingpong" else count_of(output) / place.seconds


@dataclass(frozen=True, slots=True)
class Bulk:
    """One TCP stream of iperf3."""

    metric: Metric
    outward: bool

    def measure(self, case: Case, place: Place) -> float:
        """Gigabits a second that arrived."""
        with case.serve(place.net, Server(lambda port: ["iperf3", "-s", "-1", "-p", str(port)])) as port:
            direction = ["-R"] if self.outward else []
            command = ["iperf3", "-J", "-c", HOST_ADDRESS, "-p", str(port), "-t", str(max(1, round(place.seconds)))]
            return gigabits(run(place.net.client.enter(*command, *direction), place.seconds + 30))


@dataclass(frozen=True, slots=True)
class Connect:
    """The program in the container opens connections to a server on the client's side, and closes them."""

    metric: Metric
    ports: Iterator[int] = field(default_factory=lambda: count(FIRST_CLIENT_PORT))

    def measure(self, case: Case, place: Place) -> float:
        """Microseconds for socket, connect and close: the mean of one run.

        A median would not see what one call in eight, or sixteen, pays for the others.
        """
        client, port = place.net.client, next(self.ports)
        with kept(client.enter(str(place.peer), "serve", str(port))) as server:
            wait_until("listening", lambda: client.listens(port), server)
            command = [str(place.peer), "connect", CLIENT_ADDRESS, str(port), str(CONNECTS)]
            return mean_us(case.reach_out(place.net, command, timeout=60))


def build_peer(workdir: Path) -> Path:
    """Compile peer.c into ``workdir``."""
    target = workdir / "peer"
    run(["gcc", "-O2", "-Wall", "-o", str(target), str(Path(__file__).with_name("peer.c"))])
    return target


def requests_per_second(output: str) -> float:
    """The rate that wrk's ``output`` ends with. Raises BenchError where answers were not all good ones."""
    found = re.search(r"^Requests/sec:\s+([\d.]+)$", output, re.MULTILINE)
    if not found or float(found[1]) == 0 or "Non-2xx" in output:
        raise BenchError(f"wrk measured nothing:\n{output}")
    return float(found[1])


def gigabits(output: str) -> float:
    """The rate at which the receiver of an iperf3 run got the data, from its JSON ``output``."""
    try:
        return float(json.loads(output)["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (ValueError, KeyError) as error:
        raise BenchError(f"iperf3 measured nothing:\n{output}") from error


def median_us(output: str) -> float:
    """The median that peer.c printed."""
    return float(json.loads(output)["median_us"])


def count_of(output: str) -> int:
    """How many rounds peer.c counted."""
    return int(json.loads(output)["count"])


def mean_us(output: str) -> float:
    """The mean that peer.c printed."""
    return float(json.loads(output)["mean_us"])


def _nginx(workdir: Path) -> Server:
    def command(port: int) -> list[str]:
        conf = workdir / f"nginx-{port}.conf"
        conf.write_text(NGINX_CONF.format(workdir=workdir, port=port))
        return ["nginx", "-c", str(conf), "-p", str(workdir), "-e", str(workdir / "nginx.log")]

    return Server(command)


WORKLOADS: tuple[Workload, ...] = (
    Http(Metric("keepalive", "HTTP, keep-alive", "requests/s")),
    Http(Metric("request", "HTTP, a connection a request", "requests/s"), ("Connection: close",)),
    PingPong(Metric("pingpong", "TCP ping-pong, 64 bytes", "round trips/s")),
    Bulk(Metric("bulk-in", "bulk TCP to the program", "Gb/s", digits=1), outward=False),
    Bulk(Metric("bulk-out", "bulk TCP from the program", "Gb/s", digits=1), outward=True),
    Datagrams(Metric("udp-pingpong", "UDP ping-pong, 64 bytes", "round trips/s")),
    Datagrams(Metric("udp-packets", "UDP, 32 datagrams under way", "answers/s")),
    Connect(Metric("connect", "connect + close by the program", "us", digits=1, more_is_better=False)),
)
