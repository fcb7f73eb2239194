"""Which attached containers are those that a file of `graft import` names, whoever attached them, and by which name.

Where a container is decides, as its engine or the kernel says that now: by its name alone it would be lost where the
file does not say where it was, or says where it was before it was made again. Only of one that is not found, the names
count by which it is saved and attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from graft.commands import saving
from graft.commands.restore import look_for
from graft.errors import ConflictError
from graft.saved.model import LastSeen, SavedAttachment, SavedState, Target
from graft.state.engines import CGROUP_WITH_ID, WITH_IDS, FoundContainer
from graft.state.installation import Installation
from graft.state.records import Container


@dataclass(frozen=True, slots=True)
class Looked:
    """A state that is to be imported, and where its containers are that are there. ``unknown``: those of which that
    cannot be known, with the reason.
    """

    state: SavedState
    found: Mapping[Target, FoundContainer]
    unknown: Mapping[Target, str]


def look(graft: Installation, state: SavedState, before: SavedState) -> Looked:
    """Look for the containers of ``state``: where they were last seen by what was saved ``before``, or by the file.

    Not to be called under a lock (`look_for`).
    """
    last = {one.target: one.last for one in before.attachments if one.last.cgroup}
    each = tuple(replace(one, last=last.get(one.target, one.last)) for one in state.attachments)
    return Looked(replace(state, attachments=each), *look_for(graft, each))


def identify(looked: Looked, containers: Sequence[Container], saved_as: Mapping[int, str]) -> dict[Target, Container]:
    """The attached container of each attachment that has one. ``saved_as``: what containers are saved as, by number.

    Raises ConflictError where one container would have two policies.
    """
    by_path = {one.cgroup_path: one for one in containers}
    mine = {target: by_path[place.cgroup] for target, place in looked.found.items() if place.cgroup in by_path}
    taken = {one.id for one in mine.values()}
    free = [one for one in containers if one.id not in taken]
    by_saved = {saved_as[one.id]: one for one in free if one.id in saved_as}
    by_name = saving.container_of_each_name(looked.state.attachments, free)
    for target in (one.target for one in looked.state.attachments if one.target not in mine):
        if target.text in by_saved:  # also of one that was attached since it was looked for
            mine[target] = by_saved[target.text]
        elif target not in looked.found and target in by_name:
            mine[target] = by_name[target]
    _refuse_two_policies(looked.state.attachments, mine)
    return mine


def _refuse_two_policies(each: Iterable[SavedAttachment], mine: Mapping[Target, Container]) -> None:
    first: dict[int, SavedAttachment] = {}
    for one in each:
        if container := mine.get(one.target):
            other = first.setdefault(container.id, one)
            if other.policy != one.policy:
                raise ConflictError(
                    f"{other.target.text} and {one.target.text} are one container, and have two policies",
                    "leave one of them out",
                )


def may_be(target: Target, container: Container) -> bool:
    """Whether a container can be the one of that name, by the name of its cgroup: it may be attached by another."""
    name = container.cgroup_path.name
    return name == target.name if target.kind == "unit" else bool(_is_of_engine(target) and CGROUP_WITH_ID.search(name))


def _is_of_engine(target: Target) -> bool:
    return target.kind in WITH_IDS


def seen_at(looked: Looked, mine: Mapping[Target, Container]) -> SavedState:
    """The state with where those containers are that are attached."""
    each = (
        replace(one, last=_last(looked, one, mine[one.target])) if one.target in mine else one
        for one in looked.state.attachments
    )
    return replace(looked.state, attachments=tuple(each))


def _last(looked: Looked, one: SavedAttachment, container: Container) -> LastSeen:
    """What `saving.of_attached` would save."""
    if container.transport.is_supervised:  # it ends with its program
        return one.last
    place = looked.found.get(one.target)
    named = CGROUP_WITH_ID.search(container.cgroup_path.name) if _is_of_engine(one.target) else None
    number = place.id if place else named[1] if named else ""
    return LastSeen(saving.below_mount(container.cgroup_path), number, container.transport)


def as_named(target: Target, container: Container) -> Container:
    """The container by the name that an attachment has for it; a path is the name of one that has no other."""
    return container if target.kind == "cgroup" else replace(container, name=target.name, engine=target.engine)
