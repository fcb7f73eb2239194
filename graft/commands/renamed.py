"""Containers that have the name of another one, because their engine has given it to that since (`podman rename`)."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from graft.commands.saving import below_mount
from graft.errors import GraftError
from graft.state import records
from graft.state.engines import CGROUP_WITH_ID, WITH_IDS, FoundContainer, resolve
from graft.state.installation import Installation
from graft.state.records import Container


def rename_others(graft: Installation, found: FoundContainer) -> None:
    """Give attached containers that had its name the one by which their engine knows them now: who writes that name
    means the container that has it. Asks the engine about them, so under no lock.
    """
    if found.engine not in WITH_IDS:
        return
    for one in graft.containers.listing():
        if (one.engine, one.name) == (found.engine, found.name) and one.cgroup_path != found.cgroup:
            _rename(graft, one, _now(one))


def _now(container: Container) -> Container:
    """The container as its engine calls it; by its cgroup where that does not know it, or does not answer."""
    number = CGROUP_WITH_ID.search(container.cgroup_path.name)
    with contextlib.suppress(GraftError):
        found = resolve(f"{container.engine}:{number[1] if number else ''}")
        if found.cgroup == container.cgroup_path and found.name != container.name:
            return replace(container, name=found.name)
    return replace(container, name=below_mount(container.cgroup_path), engine="cgroup")


def _rename(graft: Installation, before: Container, after: Container) -> None:
    with contextlib.suppress(GraftError, OSError), graft.transaction():  # no space: what is saved goes by the id
        if before in graft.containers.listing():
            records.save(graft.settings, after)
