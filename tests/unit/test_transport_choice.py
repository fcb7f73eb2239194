"""Which transport serves a container that runs already."""

from __future__ import annotations

import pytest

from graft.commands.transport_choice import Observed, choose_transport
from graft.errors import RefusedError
from graft.model.transport import Transport

DIRECT, SWAP, SPLICE = Transport.DIRECT, Transport.SWAP, Transport.SPLICE
HOST, OTHER, THIRD = 1, 2, 3

CASES = {
    "empty": Observed(HOST),
    "in the host": Observed(HOST, {HOST: 3}),
    "in the host and elsewhere": Observed(HOST, {HOST: 1, OTHER: 2}),
    "of its own": Observed(HOST, {OTHER: 3}),
    "supervised": Observed(HOST, {OTHER: 3}, SWAP),
    "attached": Observed(HOST, {HOST: 3}, DIRECT),
    "relayed": Observed(HOST, {OTHER: 3}, SPLICE),
    "relayed and empty": Observed(HOST, {}, SPLICE),
}


@pytest.mark.parametrize(
    ("case", "best"),
    [
        ("empty", DIRECT),
        ("in the host", DIRECT),
        ("in the host and elsewhere", DIRECT),
        ("of its own", SPLICE),
        ("supervised", SWAP),
        ("attached", DIRECT),
        ("relayed", SPLICE),
        ("relayed and empty", SPLICE),
    ],
)
def test_the_best_transport_that_is_possible_is_taken(case: str, best: Transport) -> None:
    assert choose_transport(CASES[case]).transport is best
    assert choose_transport(CASES[case], best).transport is best


@pytest.mark.parametrize("case", CASES)
def test_a_transport_that_is_impossible_is_refused_with_the_reason(case: str) -> None:
    for wanted in set(Transport) - {choose_transport(CASES[case]).transport}:
        with pytest.raises(RefusedError, match=f"{wanted} is impossible: .+"):
            choose_transport(CASES[case], wanted)


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_direct_says_why_not(case: str) -> None:
    choice = choose_transport(CASES[case])
    assert choice.why
    assert bool(choice.why_not_better) == (choice.transport is not DIRECT)


def test_several_namespaces_with_none_of_them_the_hosts_are_refused() -> None:
    with pytest.raises(RefusedError, match="2 network namespaces"):
        choose_transport(Observed(HOST, {OTHER: 1, THIRD: 1}))


def test_processes_outside_the_hosts_namespace_are_counted() -> None:
    assert Observed(HOST, {HOST: 1, OTHER: 2, THIRD: 3}).outside == 5
