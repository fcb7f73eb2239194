"""What happens in a second, out of two samples."""

from __future__ import annotations

from graft.commands.sample import ContainerSample, Sample
from graft.commands.top import increase, rates
from graft.datapath.layout import HookDecision
from graft.model.transport import Transport
from graft.splice.traffic import Relayed
from graft.state.records import Container


def container(number: int = 7) -> Container:
    return Container(number, "web", "/none", Transport.SPLICE, 1, "shop", ("nx4",))


def sample(taken: float, *containers: ContainerSample) -> Sample:
    return Sample(taken, True, ("nx4",), containers)


def test_rates_are_for_a_second() -> None:
    before = ContainerSample(
        container(),
        {HookDecision.CONNECTED: 10, HookDecision.REFUSED_BIND: 1, HookDecision.REWRITTEN: 4},
        {},
        Relayed(connections_in=5, connections_out=100, bytes_in=1000, bytes_out=0),
    )
    after = ContainerSample(
        container(),
        {HookDecision.CONNECTED: 14, HookDecision.REFUSED_BIND: 2, HookDecision.DROPPED: 4, HookDecision.REWRITTEN: 9},
        {("tcp", "listening"): 1, ("tcp", "established"): 5},
        Relayed(connections_in=11, connections_out=104, bytes_in=5000, bytes_out=6),
    )
    found = rates(sample(100.0, before), sample(102.0, after))
    [one] = found.containers
    assert (found.seconds, one.sockets, one.refusals) == (2.0, 6, 6)
    assert one.connection_rate == 5.0  # 4 that it made, and 6 that graftd brought; its own are not counted twice
    assert (one.bytes_in_rate, one.bytes_out_rate, one.refusal_rate) == (2000.0, 3.0, 2.5)


def test_a_first_sample_and_a_new_container_have_no_rates() -> None:
    new = ContainerSample(container(8), {HookDecision.CONNECTED: 9}, {}, Relayed())
    for found in (rates(None, sample(1.0, new)), rates(sample(0.5), sample(1.0, new))):
        [one] = found.containers
        assert (one.connection_rate, one.bytes_in_rate, one.bytes_out_rate, one.refusal_rate) == (None,) * 4


def test_two_samples_of_one_moment_have_no_rates() -> None:
    one = sample(1.0, ContainerSample(container(), {}))
    assert rates(one, one).containers[0].connection_rate is None


def test_what_graftd_does_not_count_has_no_bytes() -> None:
    old, new = ContainerSample(container(), {}, {}, Relayed()), ContainerSample(container(), {}, {})
    for before, after in ((old, new), (new, old), (new, new)):
        [one] = rates(sample(1.0, before), sample(2.0, after)).containers
        assert (one.bytes_in_rate, one.bytes_out_rate, one.connection_rate) == (None, None, 0.0)


def test_sockets_that_were_not_listed_are_not_none_at_all() -> None:
    [one] = rates(None, sample(1.0, ContainerSample(container(), {}, None))).containers
    assert one.sockets is None


def test_a_counter_that_is_less_than_before_has_begun_anew() -> None:
    assert [increase(5, 9), increase(5, 5), increase(500, 3)] == [4, 0, 3]
