"""What `graft ps` shows: every container with its processes, supervisor and sockets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft import containers, held, splice
from graft.containers import Container
from graft.held import Held
from graft.kernel import cgroup, process
from graft.lifecycle import supervisors_cgroup
from graft.maps import Maps
from graft.settings import Settings


@dataclass(frozen=True, slots=True)
class Seen:
    """A container as it is now. ``namespaces`` are inodes; ``supervisor`` is 0 where none is needed."""

    container: Container
    processes: int
    namespaces: tuple[int, ...]
    supervisor: int
    sockets: tuple[Held, ...]
    relay: Mapping[str, Any] | None = None
    """Transport splice: what graft.splice.describe tells."""


def overview(settings: Settings) -> list[Seen]:
    """Every attached container, oldest first; those whose cgroup is gone are forgotten."""
    maps = Maps(settings.pin_dir)
    containers.reap(settings, maps)
    listed = containers.listing(settings)
    sockets = held.of(settings, maps, listed)
    supervisors = cgroup.processes(supervisors_cgroup(settings))
    found = []
    for container in listed:
        pids = cgroup.processes(container.cgroup_path)
        supervisor = supervisor_of(container, supervisors)
        relay = splice.describe(settings, container) if container.transport == "splice" else None
        found.append(Seen(container, len(pids), namespaces_of(pids), supervisor, tuple(sockets[container.id]), relay))
    return found


def namespaces_of(pids: Sequence[int]) -> tuple[int, ...]:
    """Inodes of the network namespaces of these processes."""
    seen = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # one that ended meanwhile
            seen.add(os.stat(f"/proc/{pid}/ns/net").st_ino)
    return tuple(sorted(seen))


def supervisor_of(container: Container, supervisors: Sequence[int]) -> int:
    """The process that serves a container: a child of its holder, among those of the supervisors' cgroup."""
    for pid in supervisors if container.pid else ():
        with contextlib.suppress(OSError):
            if process.parse_parent(Path(f"/proc/{pid}/stat").read_bytes()) == container.pid:
                return pid
    return 0
