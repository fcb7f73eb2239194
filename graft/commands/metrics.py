"""`graft metrics`: what Graft counts, in Prometheus' text format. Pure, but for the sample that it is given.

Names and units are those of Prometheus' conventions (https://prometheus.io/docs/practices/naming/). A container's id is
a label beside its name, because two may have the same name. Label values that a container or an image may have chosen
are escaped (graft/model/printable.py); prometheus-client escapes what the format itself needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from graft import __version__
from graft.commands.sample import ContainerSample, Sample
from graft.datapath.layout import HookDecision
from graft.model.printable import printable
from graft.model.transport import Transport
from graft.state.call_times import BOUNDS, NANOSECONDS

CONTENT_TYPE = CONTENT_TYPE_LATEST
_CONTAINER = ("container", "id")


class SampleCollector(Collector):
    """Gives the metrics of the sample that ``take`` takes, at each request."""

    def __init__(self, take: Callable[[], Sample]) -> None:
        self._take = take

    def collect(self) -> Iterator[Metric]:
        """The metrics of one sample."""
        return families(self._take())


def text(sample: Sample) -> bytes:
    """The metrics of a sample in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(SampleCollector(lambda: sample))
    return generate_latest(registry)


def families(sample: Sample) -> Iterator[Metric]:
    """Every metric. Where Graft is not up: that it is not, and its version."""
    yield _one_gauge("graft_build_info", "The version of Graft that reports.", 1, version=__version__)
    yield _one_gauge("graft_up", "Whether Graft's maps and programs are in the kernel.", sample.is_up)
    if sample.is_up:
        yield _one_gauge("graft_endpoints", "Endpoints.", len(sample.endpoints))
        yield from _of_containers(sample)
        yield _of_calls(sample)
        yield from _of_graftd(sample)
        yield from _of_sockets(sample)


def _one_gauge(name: str, help_text: str, value: float, **labels: str) -> GaugeMetricFamily:
    made = GaugeMetricFamily(name, help_text, labels=tuple(labels))
    made.add_metric(tuple(labels.values()), value)
    return made


def _labels(one: ContainerSample) -> tuple[str, str]:
    return printable(one.container.name), str(one.container.id)


def _of_containers(sample: Sample) -> Iterator[Metric]:
    number = GaugeMetricFamily("graft_containers", "Attached containers, by transport.", labels=("transport",))
    for transport in Transport:
        number.add_metric([str(transport)], sum(one.container.transport is transport for one in sample.containers))
    yield number
    info = GaugeMetricFamily(
        "graft_container_info",
        "An attached container: 1.",
        labels=(*_CONTAINER, "engine", "transport", "policy"),
    )
    decisions = CounterMetricFamily(
        "graft_decisions",
        "What the BPF programs decided for a container since it was attached.",
        labels=(*_CONTAINER, "decision"),
    )
    for one in sample.containers:
        its = one.container
        info.add_metric([*_labels(one), printable(its.engine), str(its.transport), printable(its.policy)], 1)
        for decision in HookDecision:
            decisions.add_metric([*_labels(one), decision.name.lower()], one.decisions.get(decision, 0))
    yield info
    yield decisions


def _of_calls(sample: Sample) -> Metric:
    times = HistogramMetricFamily(
        "graft_call_seconds",
        "How long the container's supervisors took for its trapped calls, each from its notification on.",
        labels=_CONTAINER,
    )
    for one in sample.containers:
        if one.calls is not None:
            bounds = [*(str(bound / NANOSECONDS) for bound in BOUNDS), "+Inf"]
            buckets = list(zip(bounds, itertools.accumulate(one.calls.counts), strict=True))
            times.add_metric(_labels(one), buckets, one.calls.total / NANOSECONDS)
    return times


def _of_graftd(sample: Sample) -> Iterator[Metric]:
    yield _one_gauge("graft_graftd_up", "Whether graftd runs and answers.", sample.graftd_started is not None)
    if sample.graftd_started is None:
        return
    yield _one_gauge(
        "graft_graftd_start_time_seconds", "When graftd was started, since the Unix epoch.", sample.graftd_started
    )
    current = GaugeMetricFamily("graft_relay_open_connections", "Connections that graftd relays.", labels=_CONTAINER)
    connections = CounterMetricFamily(
        "graft_relay_connections",
        "Connections that graftd has relayed, into a container or out of it, since it serves it.",
        labels=(*_CONTAINER, "direction"),
    )
    moved = CounterMetricFamily(
        "graft_relay_bytes",
        "Bytes of these connections, into a container or out of it.",
        labels=(*_CONTAINER, "direction"),
    )
    for one in sample.containers:
        if one.relayed is not None:
            relayed = one.relayed
            current.add_metric(_labels(one), relayed.connections)
            connections.add_metric([*_labels(one), "in"], relayed.connections_in)
            connections.add_metric([*_labels(one), "out"], relayed.connections_out)
            moved.add_metric([*_labels(one), "in"], relayed.bytes_in)
            moved.add_metric([*_labels(one), "out"], relayed.bytes_out)
    yield current
    yield connections
    yield moved


def _of_sockets(sample: Sample) -> Iterator[Metric]:
    yield _one_gauge("graft_sockets_complete", "Whether the kernel listed all sockets in time.", not sample.unlisted)
    sockets = GaugeMetricFamily(
        "graft_sockets",
        "Sockets of a container on the host's stack.",
        labels=(*_CONTAINER, "protocol", "state"),
    )
    for one in sample.containers:
        for (protocol, state), count in sorted((one.sockets or {}).items()):
            sockets.add_metric([*_labels(one), protocol, state], count)
    yield sockets
