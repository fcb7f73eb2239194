"""The smallest sequence that still fails, as far as a bounded number of tries gets. Pure but for the question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from dataclasses import replace
from typing import TypeVar

from tests.fuzz.model import Change, Phase, Policy, Sequence

T = TypeVar("T")
Fails = Callable[[Sequence], bool]


def shrink(sequence: Sequence, fails: Fails, tries: int = 150) -> Sequence:
    """Leave out phases, calls, changes, rules for as long as ``fails`` says yes; ask it ``tries`` times at most."""
    left = tries
    for smaller in (_phases, _calls, _changes, _rules, _endpoints):
        progress = True
        while progress and left > 0:
            progress = False
            for one in smaller(sequence):
                if left <= 0:
                    break
                left -= 1
                if fails(one):
                    sequence, progress = one, True
                    break
    return sequence


def without_pieces(items: Several[T]) -> Iterator[tuple[T, ...]]:
    """The items without the first half, the second, the first quarter and so on, down to one item each."""
    size = len(items)
    while size > 1 or (size == 1 and items):
        size = max(1, (size + 1) // 2) if size > 1 else 1
        for at in range(0, len(items), size):
            yield (*items[:at], *items[at + size :])
        if size == 1:
            return


def _phases(sequence: Sequence) -> Iterator[Sequence]:
    for phases in without_pieces(sequence.phases):
        if phases:
            yield replace(sequence, phases=phases)


def _with_phase(sequence: Sequence, number: int, phase: Phase) -> Sequence:
    return replace(sequence, phases=(*sequence.phases[:number], phase, *sequence.phases[number + 1 :]))


def _calls(sequence: Sequence) -> Iterator[Sequence]:
    for number, phase in enumerate(sequence.phases):
        for calls in without_pieces(phase.calls):
            yield _with_phase(sequence, number, replace(phase, calls=calls))


def _changes(sequence: Sequence) -> Iterator[Sequence]:
    for number, phase in enumerate(sequence.phases):
        for before in without_pieces(phase.before):
            yield _with_phase(sequence, number, replace(phase, before=before))
        for meanwhile in without_pieces(phase.meanwhile):
            yield _with_phase(sequence, number, replace(phase, meanwhile=meanwhile))


def _smaller_policies(policy: Policy) -> Iterator[Policy]:
    for ingress in without_pieces(policy.ingress):
        yield replace(policy, ingress=ingress)
    for egress in without_pieces(policy.egress):
        yield replace(policy, egress=egress)


def _smaller_changes(changes: tuple[Change, ...]) -> Iterator[tuple[Change, ...]]:
    for at, change in enumerate(changes):
        if change.policy is not None:
            for policy in _smaller_policies(change.policy):
                yield (*changes[:at], replace(change, policy=policy), *changes[at + 1 :])


def _rules(sequence: Sequence) -> Iterator[Sequence]:
    for policy in _smaller_policies(sequence.world.policy):
        yield replace(sequence, world=replace(sequence.world, policy=policy))
    for number, phase in enumerate(sequence.phases):
        for before in _smaller_changes(phase.before):
            yield _with_phase(sequence, number, replace(phase, before=before))
        for meanwhile in _smaller_changes(phase.meanwhile):
            yield _with_phase(sequence, number, replace(phase, meanwhile=meanwhile))


def _endpoints(sequence: Sequence) -> Iterator[Sequence]:
    """Without those that nothing names: all at once."""
    text = sequence.to_json()
    used = tuple(one for one in sequence.world.endpoints if text.count(f'"{one.name}"') > 1)
    if used != sequence.world.endpoints:
        yield replace(sequence, world=replace(sequence.world, endpoints=used))
