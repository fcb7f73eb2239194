"""What the benchmark's clients print, and how it is read."""

from __future__ import annotations

import random
import statistics
import subprocess

import pytest

from graft.bench.growth import PORTS, policy_text
from graft.bench.outputs import PERCENTILES, WRK_SCRIPT, cpu_usec, received_bytes, rounds_of
from graft.bench.process import BenchError
from graft.bench.workloads import PEER
from graft.policy.reader import load_policy

LINE = (
    '{"count": 4, "seconds": 2.0, "mean_us": 55.5, "p50_us": 41.5, "p90_us": 60, "p99_us": 70, "p99.9_us": 71,'
    ' "cpu_us": 100}'
)


def histogram(values: list[float]) -> dict[str, float]:
    """The percentiles that peer.c finds in ``values``, by their names, and the mean."""
    if not PEER.exists():
        pytest.skip("there was no compiler at installation")
    text = "\n".join(f"{value:.6f}" for value in values)
    output = subprocess.run([PEER, "histogram"], input=text, capture_output=True, text=True, check=True).stdout
    rounds = rounds_of(output)
    assert rounds.count == len(values)
    return {**rounds.percentiles, "mean": rounds.mean}


def test_the_rounds_of_a_client_are_read() -> None:
    rounds = rounds_of(f"what wrk says\n{LINE}\n")
    assert (rounds.count, rounds.rate, rounds.mean, rounds.cpu) == (4, 2.0, 55.5, 25.0)
    assert rounds.percentiles == {"p50": 41.5, "p90": 60, "p99": 70, "p99.9": 71}


@pytest.mark.parametrize(
    "output",
    ["", "unable to connect", "[]", "{}", LINE.replace('"count": 4', '"count": 0'), LINE[:-1] + ', "bad": 5}'],
)
def test_what_measured_nothing_is_an_error(output: str) -> None:
    with pytest.raises(BenchError, match="measured nothing"):
        rounds_of(output)


def test_what_iperf3_says_is_what_arrived() -> None:
    assert received_bytes('{"end": {"sum_received": {"bytes": 10, "bits_per_second": 9.5e9}}}') == (10, 9.5e9)
    with pytest.raises(BenchError, match="measured nothing"):
        received_bytes('{"error": "unable to connect"}')


def test_the_cpu_time_of_a_cgroup_is_read() -> None:
    assert cpu_usec("usage_usec 1234\nuser_usec 1000\nsystem_usec 234\n") == 1234
    with pytest.raises(BenchError, match="usage_usec"):
        cpu_usec("")


def test_the_script_of_wrk_has_the_path_and_no_doubled_braces() -> None:
    script = WRK_SCRIPT.format(cpu_stat="/cgroup/cpu.stat")
    assert '"/cgroup/cpu.stat"' in script
    assert "{{" not in script and '{"count": %d' in script


def test_percentiles_are_as_near_as_the_buckets_are_wide() -> None:
    chance = random.Random(7)
    values = [chance.lognormvariate(4, 1) for _ in range(20000)]
    found = histogram(values)
    exact = statistics.quantiles(values, n=1000, method="inclusive")
    for name in PERCENTILES:
        assert found[name] == pytest.approx(exact[round(float(name[1:]) * 10) - 1], rel=1 / 100)
    assert found["mean"] == pytest.approx(statistics.fmean(values), rel=1e-3)


def test_percentiles_of_equal_values_are_that_value() -> None:
    found = histogram([50.0] * 1000)
    assert found["p50"] == pytest.approx(50, rel=1 / 256) and found["p99.9"] == pytest.approx(50, rel=1 / 256)


def test_a_percentile_does_not_see_what_is_rarer() -> None:
    found = histogram([10.0] * 995 + [5000.0] * 5)
    assert found["p99"] == pytest.approx(10, rel=1 / 128)
    assert found["p99.9"] == pytest.approx(5000, rel=1 / 128)


@pytest.mark.parametrize("value", [0.2, 1.0, 1e6, 1e9])
def test_short_and_long_rounds_are_counted(value: float) -> None:
    assert histogram([value])["p50"] == pytest.approx(value, rel=1 / 100)


@pytest.mark.parametrize("count", [1, 2, 10, 1000, 10000])
def test_a_policy_of_growth_has_as_many_destinations_with_a_port(count: int) -> None:
    *near, client = load_policy(policy_text(count), "growth", None).egress
    assert client.ports is not None and len(client.ports) == 1
    assert sum(len(rule.ports or ()) for rule in near) + 1 == count
    assert len(near) <= -(-count // len(PORTS))
