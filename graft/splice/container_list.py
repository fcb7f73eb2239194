"""The containers to be served by relays, from their records, which are read only when one has changed."""

from __future__ import annotations

import time

from graft.model.settings import Settings
from graft.state import records
from graft.state.records import Container

_SETTLED_SECONDS = 1.0
"""Two changes within one tick of the file system's clock leave the same time."""


class ContainerList:
    """Reads run_dir/containers. Each change of a record changes the folder too: the record is renamed into it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._changed = -1
        self._found: dict[int, Container] = {}

    def current(self) -> dict[int, Container]:
        """Every container that is served by relays, by its number."""
        try:
            changed = records.folder_of(self._settings).stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        if changed != self._changed:
            self._found = {one.id: one for one in records.read_all(self._settings)[0] if one.is_relayed}
            is_settled = time.time() - changed / 1e9 > _SETTLED_SECONDS
            self._changed = changed if is_settled else -1
        return self._found
