"""Containers that have asked for an endpoint, and lose it when the operator makes another one of it.

They keep the operator from nothing (graft/state/endpoints.py). So a command tells him.
"""

from __future__ import annotations

from collections.abc import Set

from graft.datapath import rulesets
from graft.state.installation import Installation


def cut_off(graft: Installation, names: Set[str]) -> list[str]:
    """A line for each whose rules lead to an endpoint that is not there any more, of those with these names."""
    known = {one.id for one in graft.endpoints.listing()}
    lines = []
    for one in graft.containers.listing():
        lost = names & set(one.endpoints)
        if lost and not one.is_operators and not rulesets.endpoints_of(graft.maps, graft.ruleset_of(one)) <= known:
            which = ", ".join(sorted(lost))
            lines.append(f"{one.name} has asked for {which}, which is another endpoint now: it starts anew with that")
    return lines
