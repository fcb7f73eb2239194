"""What Graft counts as Prometheus' text: names, labels and their escapes, what is left out where it is not known."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from graft.commands import metrics
from graft.commands.metrics_server import Answer
from graft.commands.sample import ContainerSample, Sample
from graft.datapath.layout import HookDecision
from graft.errors import ConflictError
from graft.model.transport import Transport
from graft.splice.traffic import Relayed
from graft.state.records import Container


def container(number: int = 7, name: str = "web", transport: Transport = Transport.SPLICE) -> Container:
    return Container(number, name, "/none", transport, 1, "shop", ("nx4",))


def samples(sample: Sample) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every series of the text with its value."""
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(metrics.text(sample).decode())
        for one in family.samples
    }


def value(sample: Sample, name: str, **labels: str) -> float | None:
    return samples(sample).get((name, tuple(sorted(labels.items()))))


WEB = ContainerSample(
    container(),
    {HookDecision.CONNECTED: 3, HookDecision.DROPPED: 2},
    {("tcp", "listening"): 1, ("udp", "unconnected"): 4},
    Relayed(connections=2, connections_in=10, connections_out=5, bytes_in=1000, bytes_out=70),
)
SAMPLE = Sample(1.0, True, ("nx4", "out4"), (WEB,), graftd_started=1234.5)
ITS = {"container": "web", "id": "7"}


def test_each_part_of_a_sample_is_a_series() -> None:
    assert value(SAMPLE, "graft_up") == 1
    assert value(SAMPLE, "graft_endpoints") == 2
    assert value(SAMPLE, "graft_containers", transport="splice") == 1
    assert value(SAMPLE, "graft_container_info", **ITS, engine="graft", transport="splice", policy="shop") == 1
    assert value(SAMPLE, "graft_decisions_total", **ITS, decision="connected") == 3
    assert value(SAMPLE, "graft_relay_connections_total", **ITS, direction="in") == 10
    assert value(SAMPLE, "graft_relay_bytes_total", **ITS, direction="out") == 70
    assert value(SAMPLE, "graft_relay_open_connections", **ITS) == 2
    assert value(SAMPLE, "graft_sockets", **ITS, protocol="udp", state="unconnected") == 4
    assert value(SAMPLE, "graft_graftd_start_time_seconds") == 1234.5
    assert value(SAMPLE, "graft_sockets_complete") == 1


def test_what_was_never_decided_is_zero_so_that_its_first_time_is_an_increase() -> None:
    assert {one: value(SAMPLE, "graft_decisions_total", **ITS, decision=one.name.lower()) for one in HookDecision} == {
        **dict.fromkeys(HookDecision, 0),
        HookDecision.CONNECTED: 3,
        HookDecision.DROPPED: 2,
    }
    assert value(SAMPLE, "graft_containers", transport="born") == 0


def test_without_graft_there_is_only_that_it_is_not_up() -> None:
    assert {name for name, _ in samples(Sample(1.0, False))} == {"graft_build_info", "graft_up"}
    assert value(Sample(1.0, False), "graft_up") == 0


def test_what_is_not_known_is_left_out_and_said() -> None:
    unknown = Sample(1.0, True, (), (ContainerSample(container(), {}),), unlisted=("UDP",))
    assert value(unknown, "graft_graftd_up") == 0
    assert value(unknown, "graft_sockets_complete") == 0
    names = {name for name, _ in samples(unknown)}
    assert not {"graft_sockets", "graft_relay_bytes_total", "graft_graftd_start_time_seconds"} & names


def test_two_containers_of_one_name_are_two_series() -> None:
    both = Sample(1.0, True, (), (WEB, ContainerSample(container(8), {})))
    assert value(both, "graft_decisions_total", container="web", id="8", decision="connected") == 0
    assert value(both, "graft_decisions_total", **ITS, decision="connected") == 3


@pytest.mark.parametrize(
    ("name", "shown"), [('a"b\\c', 'a"b\\c'), ("a\nb", "a\\nb"), ("\x1b[2J", "\\x1b[2J"), ("\udcff", "\\udcff")]
)
def test_a_name_that_a_container_chose_is_one_escaped_label(name: str, shown: str) -> None:
    one = Sample(1.0, True, (), (ContainerSample(container(name=name), {}),))
    text = metrics.text(one).decode()
    assert text.isprintable() or not [line for line in text.splitlines() if not line.isprintable()]
    assert value(one, "graft_decisions_total", container=shown, id="7", decision="dropped") == 0


def answer(request: str) -> tuple[str, str]:
    """The first line of the answer, and its body."""
    head, _, body = Answer(request.encode(), lambda: b"text\n").answer.decode().partition("\r\n\r\n")
    return head.partition("\r\n")[0], body


def test_the_metrics_are_at_one_path() -> None:
    assert answer("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n") == ("HTTP/1.0 200 OK", "text\n")
    assert answer("GET /metrics?x=1 HTTP/1.1\r\n\r\n") == ("HTTP/1.0 200 OK", "text\n")
    assert answer("HEAD /metrics HTTP/1.1\r\n\r\n") == ("HTTP/1.0 200 OK", "")
    assert answer("GET / HTTP/1.1\r\n\r\n")[0] == "HTTP/1.0 404 Not Found"
    assert answer("POST /metrics HTTP/1.1\r\n\r\n")[0].startswith("HTTP/1.0 501 ")
    assert "Error code: 400" in answer("GET /metrics HTTP/x.y\r\n\r\n")[0]


def test_where_no_sample_can_be_taken_the_answer_says_why() -> None:
    def fail() -> bytes:
        raise ConflictError("another version's <data>")

    text = Answer(b"GET /metrics HTTP/1.1\r\n\r\n", fail).answer.decode()
    assert text.startswith("HTTP/1.0 503 ")
    assert "another version's &lt;data&gt;" in text
