"""Since when saved containers that are not attached have been where they are: each has a clock of its own.

A container's cgroup is made before its processes, and these are made before they enter the network namespace that they
stay in. So whether one that just starts has its own namespace is only known some seconds later. What others do to their
containers meanwhile does not count: a cgroup is known by its id, which no other one gets.
"""

from __future__ import annotations

import time
from collections.abc import Collection

SETTLED_SECONDS = 3.5
"""After that a container's processes are in the namespace that they stay in."""


class Sightings:
    """The containers that the watcher has seen, by the names under which they are saved."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def is_settled(self, name: str, cgroup_id: int) -> bool:
        """Whether the container ``name`` has been in the cgroup of that id for long enough. Notes that it is there."""
        now = time.monotonic()
        known, since = self._seen.get(name, (0, now))
        if known != cgroup_id:
            since = now
        self._seen[name] = cgroup_id, since
        return now - since > SETTLED_SECONDS

    def forget_others(self, names: Collection[str]) -> None:
        """Forget those that are not among ``names``."""
        self._seen = {name: one for name, one in self._seen.items() if name in names}
