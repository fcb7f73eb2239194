"""Containers that have asked for an endpoint, and lose it when the operator makes another one of it, or closes it.

They keep him from neither (graft/state/endpoints.py). So a command tells him.
"""

from __future__ import annotations

from collections.abc import Set

from graft.datapath import rulesets
from graft.state.installation import Installation
from graft.state.records import PAIRS


def cut_off(graft: Installation, names: Set[str]) -> list[str]:
    """A line for each whose rules lead to an endpoint that is not there any more, of those with these names."""
    there = {one.id: one.endpoint for one in graft.endpoints.listing()}
    closed = {endpoint.name for endpoint in there.values() if not endpoint.open}
    lines = []
    for one in graft.containers.listing():
        used = rulesets.used_by(graft.maps, graft.ruleset_of(one))
        if not one.is_operators and not used <= there.keys():
            lost = names & set(one.endpoints) - {there[number].name for number in used & there.keys()}
            refused = lost & closed if one.origin == PAIRS else set()
            if refused:
                lines.append(f"{one.name} has asked for {_text(refused)}, which is not open now: it has lost that")
            if lost - refused:
                which = f"{_text(lost - refused)}, which is another endpoint now"
                lines.append(f"{one.name} has asked for {which}: it starts anew with that")
    return lines


def _text(names: Set[str]) -> str:
    return ", ".join(sorted(names))
