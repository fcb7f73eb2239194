"""Hooks of an attached container that are not on its cgroup: somebody has detached them, or an older Graft did that was
killed while it removed the container. That it is attached is what its record says; whether it is, the kernel says. So
it does of the rules: hooks that find none leave it free.
"""

from __future__ import annotations

from collections.abc import Sequence

from graft.datapath import attachments
from graft.errors import GraftError
from graft.state import members, nesting, records
from graft.state.installation import Installation
from graft.state.records import Container


def attach_again(graft: Installation, containers: Sequence[Container]) -> dict[int, str]:
    """Give those of these containers their hooks again whose cgroups lack some. Quick if none does.

    Returns those that have not got them, or have no rules, by number, each with a line that says so.
    """
    lacking, problems = members.without_hooks(graft.settings, containers), dict[int, str]()
    for one in containers:
        if not graft.ruleset_of(one):
            if _is_without_rules(graft, one):
                problems[one.id] = f"{one.name}: it has no rules: detach and attach it again"
        elif one.id in lacking:
            try:
                nesting.refuse_below(one.cgroup_path)
                with members.within_reach(one.cgroup_path):
                    _attach_again(graft, one.id)
            except (GraftError, OSError) as error:
                problems[one.id] = f"{one.name}: its hooks were detached, and cannot be attached again: {error}"
    return problems


def _is_without_rules(graft: Installation, container: Container) -> bool:
    """Whether one that has no rules is to have some. Not where its supervisor has those of a data plane that is gone;
    and who removes a container takes its record away first.
    """
    return not container.transport.is_supervised and records.file_of(graft.settings, container.id).exists()


def _attach_again(graft: Installation, number: int) -> None:
    """Nothing where the container was removed meanwhile, or has its hooks. Raises RefusedError where programs of
    Graft's are attached above it, KernelError. (What is attached below it was before, or finds its record.)
    """
    with graft.transaction():
        for one in records.read_all(graft.settings)[0]:
            if one.id == number and attachments.lacks_programs(
                graft.settings, one.cgroup_path, one.cgroup_id, one.is_relayed
            ):
                nesting.refuse_above(one.cgroup_path)
                attachments.attach(graft.settings, one.cgroup_path, number, splice=one.is_relayed, replaces=True)
