"""Reads what the clients of the benchmark print. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graft.bench.process import BenchError

PERCENTILES = ("p50", "p90", "p99", "p99.9")


@dataclass(frozen=True, slots=True)
class Rounds:
    """What one client counted: ``count`` rounds in so many ``seconds``. Times in microseconds.

    ``cpu`` is the CPU time of everything that the benchmark had started, for each round.
    """

    count: int
    seconds: float
    mean: float
    percentiles: Mapping[str, float]
    cpu: float

    @property
    def rate(self) -> float:
        """Rounds a second."""
        return self.count / self.seconds


def rounds_of(output: str) -> Rounds:
    """What the last line of ``output`` says, of graft-peer or of wrk with WRK_SCRIPT. Raises BenchError."""
    try:
        found = json.loads(output.strip().rpartition("\n")[2])
        if found.get("bad", 0) or not found["count"]:
            raise ValueError("not every answer was a good one")
        return Rounds(
            int(found["count"]),
            float(found["seconds"]),
            float(found["mean_us"]),
            {name: float(found[f"{name}_us"]) for name in PERCENTILES},
            float(found.get("cpu_us", 0)) / found["count"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"the client measured nothing: {error}\n{output}") from error


def received_bytes(output: str) -> tuple[float, float]:
    """Bytes that the receiver of an iperf3 run got and bits a second, from its JSON. Raises BenchError."""
    try:
        received: dict[str, Any] = json.loads(output)["end"]["sum_received"]
        return float(received["bytes"]), float(received["bits_per_second"])
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"iperf3 measured nothing:\n{output}") from error


def cpu_usec(cpu_stat: str) -> int:
    """The CPU time in a cgroup's file cpu.stat, in microseconds (Documentation/admin-guide/cgroup-v2.rst)."""
    for line in cpu_stat.splitlines():
        name, _, value = line.partition(" ")
        if name == "usage_usec":
            return int(value)
    raise BenchError("cpu.stat: no usage_usec")


# wrk's own summary has no percentile above 99, and no CPU time.
WRK_SCRIPT = """
local before

local function cpu()
   local file = assert(io.open("{cpu_stat}"))
   local usage = file:read("*l"):match("usage_usec (%d+)")
   file:close()
   return tonumber(usage)
end

function setup(thread)
   before = before or cpu()
end

function done(summary, latency, requests)
   local used = cpu() - before
   io.write(string.format('\\n{{"count": %d, "seconds": %.6f, "bad": %d, "mean_us": %.3f, "p50_us": %.3f, '
      .. '"p90_us": %.3f, "p99_us": %.3f, "p99.9_us": %.3f, "cpu_us": %.0f}}\\n',
      summary.requests, summary.duration / 1e6, summary.errors.status, latency.mean, latency:percentile(50),
      latency:percentile(90), latency:percentile(99), latency:percentile(99.9), used))
end
"""
