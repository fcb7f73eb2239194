"""What an import drops, and has yet to take away: containers and endpoints that were saved, and are not any more.

Noted before the import saves, so that one that is ended is finished by the next: what is saved does not tell of them
then. By their numbers: what has the name or the cgroup later may be another one. The note goes with the data plane.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from graft.errors import KernelError, UsageError
from graft.kernel.atomic_file import write_atomically
from graft.model import json_text
from graft.model.settings import Settings

_MAX_BYTES = 16 << 20
_MAX_NUMBER = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Dropped:
    """Containers by their numbers, each with what it was saved as (KIND:NAME); and the numbers of endpoints by name."""

    containers: Mapping[int, str] = field(default_factory=dict)
    endpoints: Mapping[str, int] = field(default_factory=dict)


def noted(settings: Settings) -> Dropped:
    """What an import has noted that was not finished. Raises KernelError where that cannot be read."""
    path = _path(settings)
    try:
        parts = json_text.mapping(json_text.parse(path.read_bytes(), path.name, _MAX_BYTES), path.name)
        containers = json_text.text_by_name(parts.get("containers"), "containers")
        endpoints = json_text.mapping(parts.get("endpoints"), "endpoints")
        return Dropped(
            {int(number): name for number, name in containers.items()},
            {name: json_text.number(number, "endpoints", _MAX_NUMBER) for name, number in endpoints.items()},
        )
    except FileNotFoundError:
        return Dropped()
    except (OSError, UsageError, ValueError) as error:
        raise KernelError(f"cannot read {path}: {error}", "graft down --force, graft up") from error


def note(settings: Settings, dropped: Dropped) -> None:
    """Note it; nothing, if there is nothing. Raises KernelError."""
    if not dropped.containers and not dropped.endpoints:
        forget(settings)
        return
    path = _path(settings)
    value = {"containers": dropped.containers, "endpoints": dropped.endpoints}
    try:
        write_atomically(path, json.dumps(value).encode())
    except OSError as error:
        raise KernelError(f"cannot write {path}: {error.strerror}; nothing was changed") from error


def forget(settings: Settings) -> None:
    """It was taken away, or is gone with the data plane. Safe to repeat."""
    _path(settings).unlink(missing_ok=True)


def _path(settings: Settings) -> Path:
    return settings.run_dir / "dropped.json"
