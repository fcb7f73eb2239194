"""What a container listens on now, and what of it to publish: found in steps, however much there is to look at."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from graft.errors import NotFoundError
from graft.kernel import cgroup
from graft.kernel.sockdiag import Diagnostics
from graft.splice.jobs import Steps
from graft.splice.publication import Publications

_AT_ONCE = 16


def cgroup_ids(path: Path, root: int) -> Steps[set[int]]:
    """The ids of a cgroup and of all below it: sockets tell which one they were made in.

    Raises NotFoundError where the cgroup at ``path`` is not the one whose id is ``root`` (0: any).
    """
    found: set[int] = set()
    for folder in cgroup.tree(path):
        try:
            number = cgroup.cgroup_id(folder)
        except OSError:  # gone meanwhile
            continue
        if not found and root not in (0, number):
            break
        found.add(number)
        if len(found) % _AT_ONCE == 0:
            yield
    if not found:
        raise NotFoundError(f"the cgroup {path} is gone")
    return found


def survey(diagnostics: Diagnostics, choice: Publications, besides: Collection[int]) -> Steps[None]:
    """Tell ``choice`` of every listener but those on the ports ``besides``. Raises OSError."""
    for piece in diagnostics.listeners():
        yield
        for number, listener in enumerate(piece, 1):
            if listener.port not in besides:
                choice.consider(listener)
            if number % _AT_ONCE == 0:
                yield
