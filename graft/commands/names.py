"""Names that exist, for a shell that completes a command line: of endpoints, containers, policy files.

Reads only, and says nothing: without root, without Graft, or where something cannot be read, there are no names. A
shell puts what it gets into a command line, and a container may have chosen its name: one with a character that means
anything to a shell is left out.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from graft.errors import GraftError
from graft.model.settings import POLICIES, POLICY_FOLDER, Settings

_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./:@+,-]*", re.ASCII)
_SUFFIXES = (".yaml", ".yml")
_MOST = 1000  # nobody chooses among more


def plain(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that mean the same to every shell, each once, in order."""
    return sorted({name for name in names if _PLAIN.fullmatch(name)})[:_MOST]


def endpoints(settings: Settings) -> list[str]:
    """The names of the endpoints in force."""
    from graft.datapath.maps import Maps

    if os.geteuid() != 0:
        return []
    with contextlib.suppress(GraftError, OSError, ValueError):
        maps = Maps(settings.pin_dir)
        try:
            return plain(key.name.decode() for key in maps.endpoint_names.keys())  # noqa: SIM118  # a map of the kernel
        finally:
            maps.close()
    return []


def attached(settings: Settings) -> list[str]:
    """The names of the attached containers, as `graft ps` shows them; the path of a cgroup that has no other."""
    from graft.state import records

    with contextlib.suppress(GraftError, OSError):
        return plain(container.name for container in records.read_all(settings)[0])
    return []


def saved(settings: Settings) -> list[str]:
    """The names of the containers that are saved, there or not; with their kinds, such as docker:web."""
    from graft.saved.store import Store

    with contextlib.suppress(GraftError, OSError):
        return plain(one.target.text for one in Store(settings).read()[0].attachments)
    return []


def policy_files(settings: Settings, begun: str) -> list[str]:
    """Policies by their paths: those that are found by name, and, if nothing is ``begun``, of the current folder."""
    folders = [settings.state_dir / POLICY_FOLDER, POLICIES, *([] if begun else [Path()])]
    found: list[str] = []
    for folder in folders:
        with contextlib.suppress(OSError):
            found += [str(path) for path in folder.iterdir() if path.suffix in _SUFFIXES]
    return plain(found)
