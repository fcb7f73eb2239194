"""Containers: a cgroup, a network namespace, a policy in the maps, and a record with its name. Reads them.

The maps contain what the hooks need, the record (graft/state/records.py) the rest. container_changes.py changes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graft.errors import ConflictError, NotFoundError, UsageError
from graft.model.address import shown
from graft.model.settings import Settings
from graft.state import members, records
from graft.state.records import Container


class Containers:
    """Reads containers. Needs no lock."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def read_all(self) -> tuple[list[Container], list[UsageError]]:
        """Every attached container, oldest first; and an error for each record that cannot be read."""
        return records.read_all(self._settings)

    def listing(self) -> list[Container]:
        """Every attached container whose record can be read, oldest first."""
        return self.read_all()[0]

    def find(self, name: str) -> Container:
        """The container with that cgroup, id, or name: of those with one name, the operator's.

        Raises NotFoundError, which also names an unreadable record, and ConflictError where the name is ambiguous.
        """
        every, unreadable = self.read_all()
        found = [one for one in every if name in (one.cgroup, str(one.id))] or named(every, name)
        if len(found) > 1:
            gone = members.gone(found)
            found = [one for one in found if one.id not in gone] or found[:1]
        if len(found) > 1:
            ids = ", ".join(str(one.id) for one in found)
            raise ConflictError(f"container: {shown(name)} is ambiguous: {ids}", "write one of these ids (graft ps)")
        if found:
            return found[0]
        hint = "; ".join(["graft ps", *(error.message for error in unreadable[:1])])
        raise NotFoundError(f"container: {shown(name)} is not attached", hint)

    def at(self, path: Path) -> Container | None:
        """The container whose cgroup is at ``path``, None if none is attached there."""
        found = [one for one in self.listing() if one.cgroup == str(path)]
        gone = members.gone(found)
        return next((one for one in found if one.id not in gone), None)


def named(containers: Sequence[Container], name: str) -> list[Container]:
    """Those of that name: the operator's own, or where there is none, those that have asked for their policies."""
    found = [one for one in containers if one.name == name]
    return [one for one in found if one.is_operators] or found
