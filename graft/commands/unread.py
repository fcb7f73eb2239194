"""What is saved of containers in files that cannot be read now, and may be later: the disk does not give them, or a
newer version has written them.

A file's name tells of which KIND:NAME it is: that of a container which is attached by that name is replaced, removed or
left alone in this boot without being read, where no other can have had the name (`certain`). Any other may be what is
saved of the same container by another name: who changes or ends what is saved does so, and tells of these files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from graft.errors import ConflictError, UnfinishedError, UsageError
from graft.kernel import cgroup
from graft.model.address import shown
from graft.saved.model import ENGINES, Target, parse_target
from graft.saved.store import ATTACHMENTS, BadFile, Store, file_name
from graft.state.engines import WITH_IDS


def of_names(bad: Iterable[BadFile], names: Iterable[Target]) -> list[Target]:
    """Those of ``names`` by which something is saved that cannot be read."""
    files = {one.path.name for one in _of_containers(bad)}
    return [one for one in sorted(names) if file_name(one) in files]


def certain(names: Iterable[Target]) -> set[Target]:
    """Those by which no other container can be saved: an engine may have given its name to another one since."""
    return {one for one in names if one.kind not in WITH_IDS}


def beside(store: Store, bad: Iterable[BadFile], names: Iterable[Target], save: bool) -> list[str]:
    """A line for each file that has none of ``names``; without ``save`` not for one that is left alone in this boot."""
    files = {file_name(one) for one in names}
    others = [one for one in _of_containers(bad) if one.path.name not in files]
    return [one.line for one in others if save or not store.is_paused(ATTACHMENTS, one.path.name)]


def _of_containers(bad: Iterable[BadFile]) -> list[BadFile]:
    return [one for one in bad if one.path.parent.name == ATTACHMENTS]


def named(bad: Iterable[BadFile], text: str) -> Target | None:
    """The one of these that ``text`` names: KIND:NAME, a name, or the path of a cgroup. Raises ConflictError."""
    found = of_names(bad, _meant(text))
    if len(found) > 1:
        several = ", ".join(one.text for one in found)
        raise ConflictError(f"cgroup: {shown(text)} is ambiguous: {several}", "write one of them")
    return found[0] if found else None


def _meant(text: str) -> set[Target]:
    """All that ``text`` may name."""
    path, top = Path(text), cgroup.v2_mount()
    if path.is_absolute():
        return {Target("cgroup", str(path.relative_to(top)))} if path.is_relative_to(top) else set()
    try:
        return {parse_target(text)}
    except UsageError:
        name = text.rstrip("/")
        return {Target("unit", f"{name}.service"), *(Target(kind, name) for kind in ENGINES)}


def check(name: str, lines: Sequence[str]) -> None:
    """Raises UnfinishedError where what is saved of a container could not be changed or forgotten, or not all of it:
    each line says why.
    """
    if lines:
        message = f"{name}: what is saved of it may come back: {'; '.join(lines)}"
        raise UnfinishedError(message, "repeat the command when it can be read; `graft up` tells")
