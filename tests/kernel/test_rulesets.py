"""Rulesets in the maps: each is erased as a whole, and nothing of another one's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from graft.datapath import rulesets
from graft.errors import KernelError
from graft.kernel.bpf import Map
from graft.model.endpoint import parse_endpoint
from graft.policy.compiler import RuleSet, compile_policy
from graft.policy.model import policy_from_flags
from tests.support.installation import Host

pytestmark = pytest.mark.kernel

FIRST = 0x7F000000
NUMBERS = [FIRST, FIRST + 1, FIRST + 2, FIRST + 3, FIRST + 0x100, FIRST + 0x10000, FIRST + 0x1FF]
"""Far from those of other tests. In the trie their lowest byte comes first."""
ENDPOINTS = {
    "four": parse_endpoint("four", "0.0.0.0:0"),
    "port": parse_endpoint("port", "0.0.0.0:7000"),
    "six": parse_endpoint("six", "[::]:0"),
}
IDS = {"four": FIRST + 7, "port": FIRST + 8, "six": FIRST + 9}


def rules(chance: random.Random) -> RuleSet:
    """A policy with prefixes inside of prefixes, and ranges."""
    binds = [
        f"127.0.{chance.randrange(9)}.{n}:{chance.randrange(1, 500)}-{chance.randrange(500, 65535)}=port"
        for n in range(9)
    ]
    to4 = {f"{chance.randrange(1, 4)}.{chance.randrange(256)}.0.0/{chance.randrange(16, 20)}": "four" for _ in range(9)}
    to6 = {f"fd{chance.randrange(10, 12)}:{chance.randrange(9)}::/{chance.randrange(32, 65)}": "six" for _ in range(9)}
    outs = [f"{to}={name}" for to, name in {**to4, **to6, "0.0.0.0/0": "four", "::/0": "six"}.items()]
    return compile_policy(policy_from_flags("t", [*binds, "*:0=four"], outs), ENDPOINTS)


def counts(host: Host) -> Counter[tuple[str, int]]:
    """How many entries each ruleset has in each map."""
    maps = host.maps
    tables: list[tuple[str, Map]] = [  # type: ignore[type-arg]
        ("ingress", maps.ingress),
        ("egress", maps.egress),
        ("egress_ports", maps.egress_ports),
        ("uses", maps.uses),
    ]
    return Counter((name, key.ruleset) for name, table in tables for key in table.keys())  # noqa: SIM118


@pytest.fixture
def written(host: Host) -> Iterator[Host]:
    chance = random.Random(12)
    for number in NUMBERS:
        rulesets.write(host.maps, number, rules(chance), IDS)
    yield host
    for number in NUMBERS:
        rulesets.erase(host.maps, number)
    assert not [entry for entry in counts(host) if entry[1] >= FIRST]


@pytest.mark.parametrize("number", NUMBERS)
def test_all_of_a_ruleset_is_erased_and_nothing_of_others(written: Host, number: int) -> None:
    before = counts(written)
    assert {name for name, ruleset in before if ruleset == number} == {"ingress", "egress", "egress_ports", "uses"}
    rulesets.erase(written.maps, number)
    assert counts(written) == Counter({entry: count for entry, count in before.items() if entry[1] != number})


def test_so_it_is_where_there_is_no_room_for_the_key_before_them(
    written: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = counts(written)

    def put(_self: Map, _key: object, _value: object) -> None:  # type: ignore[type-arg]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Map, "put", put)
    rulesets.erase(written.maps, NUMBERS[2])
    monkeypatch.undo()
    assert counts(written) == Counter({entry: count for entry, count in before.items() if entry[1] != NUMBERS[2]})


def test_a_ruleset_for_which_there_is_no_room_leaves_nothing(written: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    before, put = counts(written), Map.put
    left = iter(range(100))

    def put_some(self: Map, key: object, value: object) -> None:  # type: ignore[type-arg]
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        put(self, key, value)

    monkeypatch.setattr(Map, "put", put_some)
    with pytest.raises(KernelError, match=r"^policy: no room"):
        rulesets.write(written.maps, FIRST + 0x20, rules(random.Random(1)), IDS)
    monkeypatch.undo()
    assert counts(written) == before


def test_what_uses_an_endpoint_is_known(written: Host) -> None:
    assert rulesets.using(written.maps, IDS["port"]) == set(NUMBERS)
    assert rulesets.ingress_using(written.maps, IDS["four"]) == (True, True)
    assert rulesets.ingress_using(written.maps, IDS["port"]) == (True, False)
    assert rulesets.ingress_using(written.maps, IDS["six"]) == (False, False)
    assert rulesets.endpoints_of(written.maps, NUMBERS[1]) == {IDS["four"], IDS["port"]}
    assert rulesets.endpoints_in_use(written.maps) >= set(IDS.values())


def test_a_copy_leads_elsewhere_where_it_is_to_and_nowhere_else(written: Host) -> None:
    old, new, other = NUMBERS[1], FIRST + 0x20, FIRST + 10
    rulesets.copy(written.maps, {old: new}, IDS["port"], other)
    before, found = rulesets.used_by(written.maps, old), counts(written)
    assert rulesets.used_by(written.maps, new) == before - {IDS["port"]} | {other}
    assert {count for (_, number), count in found.items() if number == new}
    for name in ("ingress", "egress", "egress_ports", "uses"):
        assert found[name, new] == found[name, old]
    assert rulesets.ingress_using(written.maps, other) == (True, False)
    assert {value.endpoint for key, value in written.maps.ingress.items() if key.ruleset == new} == {IDS["four"], other}
    rulesets.erase(written.maps, new)
