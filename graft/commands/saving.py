"""Saves what a command changes: written before the change, put in place after it.

    with saving.endpoint(settings, endpoint, save):     # on a full disk this fails, and nothing is changed
        change.endpoints.add(endpoint)                  # if this fails, what was saved before stays

All of it has the lock on what is saved (graft/saved/store.py), so that nobody restores meanwhile what is being taken
away. That lock is taken before the installation's.

A container belongs to the saved attachment that was last seen at its cgroup, because its name may have been written in
several ways; and to the one that has the name by which it is attached: where that was last seen may not be known. A
container keeps that name when its engine gives it to another one (`rename`), so it counts only with the id that is
saved, if one is. Of what cannot be read now, only the name counts (unread.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from graft.commands import unread
from graft.errors import ConflictError, GraftError, KernelError, NotFoundError
from graft.kernel import cgroup
from graft.kernel.atomic_file import PreparedFile
from graft.model.address import shown
from graft.model.endpoint import Endpoint
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.policy.model import Policy
from graft.saved.model import LastSeen, SavedAttachment, SavedState, Target
from graft.saved.store import ATTACHMENTS, ENDPOINTS, BadFile, Store, file_name
from graft.state import records
from graft.state.engines import WITH_IDS, FoundContainer
from graft.state.installation import Installation
from graft.state.records import Container


@contextlib.contextmanager
def endpoint(settings: Settings, changed: Endpoint, save: bool) -> Iterator[None]:
    """Save an endpoint with the change that the block makes. Raises KernelError if it cannot be saved."""
    store = Store(settings)
    if not save:
        yield
        return
    with store.locked(), _in_place_after(store.prepare_endpoint(changed)):
        yield
        store.resume(ENDPOINTS, changed.name)


@contextlib.contextmanager
def alone(settings: Settings, save: bool) -> Iterator[bool]:
    """Have the lock on what is saved, if anybody may have it, or (``save``) something is to be saved. Gives whether."""
    store = Store(settings)
    if not save and not store.has_lock:
        yield False
        return
    with store.locked(saves=save):
        yield True


def remove_left(graft: Installation, is_alone: bool) -> None:
    """Remove the rules that a killed command has written and nobody has: a policy may declare an endpoint anew that
    they name. In the block of `alone`, which has given ``is_alone``: an import has such rules too, as long as it has
    the lock on what is saved.
    """
    with graft.transaction() as change:
        if is_alone or not Store(graft.settings).has_lock:
            change.containers.remove_left()


@contextlib.contextmanager
def attachment(settings: Settings, made: SavedAttachment | None, save: bool) -> Iterator[list[str]]:
    """As `endpoint`, for an attachment (None: one that is not to be saved), and under the lock already (`alone`).

    Without ``save``, and of a container that is saved, the policy is noted for now, and where it is. Gives a line for
    each file that may be what is saved of it by another name, and cannot be read.
    """
    store = Store(settings)
    if made is None:
        yield []
        return
    each, bad = _saved_of(store, made)
    by_name = {made.target} if save else unread.certain([made.target])  # what is saved by that name is this one's then
    names = by_name | {Target("cgroup", made.last.cgroup)}
    unread_too = [replace(made, target=target) for target in unread.of_names(bad, names)]
    beside = unread.beside(store, bad, names, save)
    if not save:
        attached = {below_mount(one.cgroup_path) for one in records.read_all(settings)[0]} - {"", made.last.cgroup}
        each = [one for one in each if one.last.cgroup not in attached]  # not one that had its name
        with _noted_for_now(store, [*each, *unread_too], made.policy):
            yield beside
        for one in each:
            with contextlib.suppress(KernelError):  # no space: who restores does it
                note_last(store, one, made.last)
        return
    others = [one for one in (*each, *unread_too) if one.target != made.target]
    with _in_place_of(store, [made, *(replace(one, policy=made.policy) for one in others)]):
        yield beside
        store.resume(ATTACHMENTS, file_name(made.target))
    for one in others:  # one cgroup has one policy, whatever the container was called before
        store.remove_attachment(one.target)


@contextlib.contextmanager
def policy_of(settings: Settings, container: Container, policy: Policy, save: bool) -> Iterator[list[BadFile]]:
    """The same for another policy of a container, if its attachment is saved. Gives what cannot be read."""
    store = Store(settings)
    saved, bad = _each_of(store, container)
    each = [*saved, *_anew(container, policy, bad)]
    change = _in_place_of(store, [replace(one, policy=policy) for one in each])
    with change if save else _noted_for_now(store, each, policy):
        yield bad


@contextlib.contextmanager
def _in_place_of(store: Store, each: Sequence[SavedAttachment]) -> Iterator[None]:
    """Save attachments of one container after the block, with one policy; the first is the last in its place.

    What is noted for now gets that policy before the block, and goes last: wherever the command ends, the container
    does not start again by one that it had for now, when another is in force.
    """
    with contextlib.ExitStack() as stack:  # what is prepared last is in its place first
        for one in each:
            stack.enter_context(_in_place_after(store.prepare_attachment(one)))
        for one in each:
            stack.enter_context(store.for_now_changed(one, one.policy))
        yield
    for one in each:
        store.drop_for_now(one.target)


@contextlib.contextmanager
def _noted_for_now(store: Store, each: Sequence[SavedAttachment], policy: Policy) -> Iterator[None]:
    """Note the policy that the block gives a container, which is saved as ``each``: it is restored by that."""
    with contextlib.ExitStack() as stack:
        for one in each:
            stack.enter_context(_in_place_after(store.prepare_for_now(one, policy)))
        yield
    for one in each:
        store.resume(ATTACHMENTS, file_name(one.target))


def _saved_of(store: Store, made: SavedAttachment) -> tuple[list[SavedAttachment], list[BadFile]]:
    """What is saved of a container: by its name, and at its cgroup; and what cannot be read."""
    state, bad = store.read()
    where = made.last.cgroup
    return [one for one in state.attachments if one.target == made.target or _is_at(one, where)], bad


@contextlib.contextmanager
def removed(settings: Settings, container: Container, save: bool) -> Iterator[list[str]]:
    """Forget a container's attachment after the block has removed it; without ``save`` only for this boot. Gives a line
    for each file that may be what is saved of it by another name, and cannot be read.

    After it: a command that is killed between the two leaves a container that is attached again. What is to be taken
    away for this boot is taken away also if nothing can be read, and what cannot be noted gets a line, too.
    """
    store = Store(settings)
    if not store.exists:
        yield []
        return
    names = unread.certain(names_of(container))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(store.locked(saves=save))
            each, bad = _each_of(store, container)
        except GraftError as error:
            if save:
                raise
            targets, lines = names, [error.message.removesuffix("; nothing was changed")]
        else:
            targets = {*(one.target for one in each), *unread.of_names(bad, names)}
            lines = unread.beside(store, bad, names, save)
        yield lines
        lines += _forget_each(store, targets, save)


def _forget_each(store: Store, targets: Iterable[Target], save: bool) -> Iterator[str]:
    """`forget` them. Gives a line for each of which that is not possible."""
    for target in sorted(targets):
        try:
            forget(store, target, save)
        except GraftError as error:
            yield error.message


def forget(store: Store, target: Target, save: bool) -> None:
    """Forget an attachment, or (without ``save``) leave it alone in this boot. Under the lock. Raises KernelError."""
    if save:
        store.remove_attachment(target)
    else:
        store.pause(ATTACHMENTS, file_name(target))
    store.drop_for_now(target)


def waiting(graft: Installation, state: SavedState | None = None) -> list[SavedAttachment]:
    """What is saved (``state``, where that was read) and not attached now, each with the policy that it is to get.
    Raises KernelError.

    One that is attached by what it asked for itself waits for what is saved.
    """
    store = Store(graft.settings)
    if not store.exists:
        return []
    attached = [one for one in graft.containers.listing() if one.is_operators]
    each = (state or store.read()[0]).attachments
    there = container_of_each(each, attached)
    return [wanted_or_saved(store, one) for one in each if one.target not in there]


def container_of_each(each: Sequence[SavedAttachment], containers: Sequence[Container]) -> dict[Target, Container]:
    """The container of each of these, of those that have one."""
    by_path = {path: one for one in containers if (path := below_mount(one.cgroup_path))}
    there = {one.target: by_path[one.last.cgroup] for one in each if one.last.cgroup in by_path}
    return container_of_each_name(each, containers) | there


def container_of_each_name(each: Sequence[SavedAttachment], containers: Sequence[Container]) -> dict[Target, Container]:
    """The same by the names by which they are attached, wherever that is."""
    named: dict[Target, list[Container]] = {}
    for container in containers:
        for name in names_of(container):
            named.setdefault(name, []).append(container)
    found = {one.target: _of_id(one, named.get(one.target, ())) for one in each}
    return {target: container for target, container in found.items() if container is not None}


def _of_id(saved: SavedAttachment, named: Sequence[Container]) -> Container | None:
    """The latest of those with its name, whose cgroup has its id in the name too, if that is known: an engine may have
    given the name to another container since.
    """
    return next((one for one in reversed(named) if saved.last.id in one.cgroup_path.name), None)


def names_of(container: Container) -> set[Target]:
    """By its cgroup, and by the name that its engine has for it, if it is attached by that."""
    named = None if container.engine == "cgroup" else Target.of(container.engine, container.name)
    return {Target("cgroup", below_mount(container.cgroup_path)), *([named] if named else [])}


def wanted_or_saved(store: Store, saved: SavedAttachment) -> SavedAttachment:
    """With the policy that it is to get; where that cannot be read it waits, and is known by the one that is saved."""
    try:
        return store.wanted(saved)
    except KernelError:
        return saved


def find_each_waiting(
    graft: Installation, policy: str, text: str | None, save: bool, state: SavedState | None = None
) -> list[SavedAttachment]:
    """The one that waits and that ``text`` names; None: all that wait under a policy with that name. Without ``save``
    not those that are detached for now. ``state`` as in `waiting`.
    """
    if text is None:
        found = [one for one in waiting(graft, state) if one.policy.name == policy]
    elif is_attached(graft, text):
        return []
    else:
        named = find_waiting(graft, text, state)
        found = [] if named is None else [named]
    store = Store(graft.settings)
    return [one for one in found if save or not store.is_paused(ATTACHMENTS, file_name(one.target))]


def is_attached(graft: Installation, text: str) -> bool:
    """Whether `graft ps` shows a container of that name, cgroup or id."""
    try:
        graft.containers.find(text)
    except NotFoundError:
        return False
    return True


def saved_otherwise(
    graft: Installation, policy: str, others: Sequence[SavedAttachment], state: SavedState
) -> list[SavedAttachment]:
    """What is saved under a policy with that name, and has one of another name for now, or in force; not ``others``,
    which wait.
    """
    each, waits = state.attachments, {one.target for one in others}
    there = container_of_each(each, graft.containers.listing())
    under_it = {target for target, container in there.items() if container.policy == policy}
    return [one for one in each if one.policy.name == policy and one.target not in waits | under_it]


@contextlib.contextmanager
def saved_of_each(settings: Settings, each: Sequence[SavedAttachment], policy: Policy) -> Iterator[None]:
    """As `policy_of`, of attachments that keep what they have for now: the policy is saved only."""
    store = Store(settings)
    with contextlib.ExitStack() as stack:
        for one in each:
            stack.enter_context(_in_place_after(store.prepare_attachment(replace(one, policy=policy))))
        yield


def replace_waiting(settings: Settings, saved: SavedAttachment, policy: Policy, save: bool) -> None:
    """Give one that waits another policy, under the lock (`alone`); without ``save`` for now. Raises KernelError."""
    store = Store(settings)
    if not save:
        put_in_place(store.prepare_for_now(saved, policy).commit)
        return
    with _in_place_of(store, [replace(saved, policy=policy)]):
        pass


def find_waiting(graft: Installation, text: str, state: SavedState | None = None) -> SavedAttachment | None:
    """The one that waits and that ``text`` names: KIND:NAME, a name that only one has, or the path of its cgroup.
    ``state`` as in `waiting`.
    """
    every = waiting(graft, state)
    for one in every:
        if text == one.target.text:
            return one
    path = below_mount(Path(text)) if text.startswith("/") else text.rstrip("/")
    named = [one for one in every if text == one.target.name or (path and path == one.last.cgroup)]
    named += [one for one in every if one.target == Target("unit", f"{text}.service")]
    if len(named) > 1:
        several = ", ".join(one.target.text for one in named)
        raise ConflictError(f"cgroup: {shown(text)} is ambiguous: {several}", "write one of them")
    return named[0] if named else None


def of_attached(
    target: FoundContainer, policy: Policy, transport: Transport, asked: Transport | None, relay: str | None
) -> SavedAttachment | None:
    """What is saved of a container that is attached with ``transport``; ``asked`` is the one that was asked for.

    None for one that Graft started, which ends with its program.
    """
    named = Target.of(target.engine, target.name)
    if named is None or transport.is_supervised:
        return None
    return SavedAttachment(named, policy, asked, relay, place_of(target, transport))


def place_of(target: FoundContainer, transport: Transport | None = None) -> LastSeen:
    """Where a container is, as that is saved."""
    return LastSeen(below_mount(target.cgroup), target.id if target.engine in WITH_IDS else "", transport)


def other_seen_at(each: Sequence[SavedAttachment], saved: SavedAttachment, place: LastSeen) -> SavedAttachment | None:
    """The one of ``each`` that the container at ``place`` is, where that was found by the name of another one,
    ``saved``: its engine may have given the name to it since (`rename`). None where ``saved`` itself was last seen
    there, or nobody.
    """
    if _was_seen_at(saved, place):
        return None
    return next((one for one in each if one.target != saved.target and _was_seen_at(one, place)), None)


def _was_seen_at(saved: SavedAttachment, place: LastSeen) -> bool:
    """By the id, where both have one: no other container ever gets that."""
    if saved.last.id and place.id:
        return saved.last.id == place.id
    return (saved.target.name if saved.target.kind == "cgroup" else saved.last.cgroup) == place.cgroup != ""


def note_last(store: Store, saved: SavedAttachment, last: LastSeen) -> None:
    """Save where a container is now, unless that is where another one was last seen. Raises KernelError."""
    if last != saved.last and other_seen_at(store.read()[0].attachments, saved, last) is None:
        put_in_place(store.prepare_attachment(replace(saved, last=last)).commit)


def below_mount(path: Path) -> str:
    """The path of a cgroup below the v2 mount."""
    top = cgroup.v2_mount()
    return str(path.relative_to(top)) if path.is_relative_to(top) else ""


def at(store: Store, path: Path) -> SavedAttachment | None:
    """The attachment that was last seen at a cgroup."""
    where = below_mount(path)
    return next((one for one in store.read()[0].attachments if _is_at(one, where)), None)


def of_ended(store: Store, container: Container, policy: Policy) -> SavedAttachment | None:
    """What is saved of a container that is not attached any more, which is to get this policy."""
    state, bad = store.read()
    where = below_mount(container.cgroup_path)
    saved = [one for one in state.attachments if _is_at(one, where)]
    return next(iter((*saved, *_anew(container, policy, bad))), None)


def _each_of(store: Store, container: Container) -> tuple[list[SavedAttachment], list[BadFile]]:
    """What is saved of a container that is attached, and what cannot be read."""
    state, bad = store.read()
    mine = container_of_each(state.attachments, [container])
    return [one for one in state.attachments if one.target in mine], bad


def _anew(container: Container, policy: Policy, bad: Sequence[BadFile]) -> list[SavedAttachment]:
    """What is to be saved of an attached container by those of its names by which it is in files that cannot be read:
    as if it had been attached without a word on its transport.
    """
    transport = None if container.transport.is_supervised else container.transport
    last = LastSeen(below_mount(container.cgroup_path), transport=transport)
    names = unread.of_names(bad, unread.certain(names_of(container)))
    return [SavedAttachment(one, policy, last=last) for one in names]


def _is_at(saved: SavedAttachment, where: str) -> bool:
    return saved.last.cgroup == where != ""


@contextlib.contextmanager
def _in_place_after(prepared: PreparedFile) -> Iterator[None]:
    try:
        yield
    except BaseException:
        prepared.discard()
        raise
    put_in_place(prepared.commit)


def put_in_place(commit: Callable[[], None]) -> None:
    """Put in place what was written before a change that is made. Raises KernelError that says so."""
    try:
        commit()
    except OSError as error:
        raise KernelError(
            f"the change is in force, but was not saved: {error.strerror}", "repeat the command"
        ) from error
