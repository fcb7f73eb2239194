"""Restores what is saved: endpoints, and the policies of containers that are there. The others wait (watcher.py).

`graft up` restores, and so does the first command after a boot that needs Graft (graft/state/installation.py, by way
of up.py). Repeatable: what is in force already stays as it is, and so does what an operator took away
with `--no-save`. A container that starts again has the policy that it was given with that.

A container is looked for where it was last seen, without asking its engine: at boot that may not have started, and may
itself be waiting for `graft up`. Engines are asked only where containers run that are not known to be saved: wherever
an engine has made a container's cgroup (`--cgroup-parent`, a pod), its id is in the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from graft.commands import saving, why_waiting
from graft.commands.attach import Seen, attach_seen, look_at
from graft.commands.container_search import ask_of_each, cgroup_id_at, container_folders
from graft.commands.detach import take_away
from graft.commands.policy_apply import update_relay
from graft.commands.sightings import Sightings
from graft.commands.transport_choice import as_attached, stay_direct
from graft.errors import GraftError, KernelError, NotFoundError, RefusedError
from graft.kernel import cgroup
from graft.model.transport import Transport
from graft.saved.model import SavedAttachment, SavedState, Target
from graft.saved.store import ATTACHMENTS, ENDPOINTS, Store, file_name
from graft.state import lost_hooks, members
from graft.state.engines import WITH_IDS, FoundContainer, NoAnswerError, is_silent, resolve
from graft.state.installation import Installation
from graft.state.records import RUNTIME, Container

NOT_THERE = "it is not running"
NOT_TRIED = "it runs, and was not attached yet"
ANOTHERS = "the container that has its name now is saved as"
_CHANGED = "a command changed it at the same time"


@dataclass(slots=True)
class Restored:
    """What was done: the names of endpoints and containers, and who waits and why.

    ``set_aside`` are lines about files that cannot be used, ``problems`` about those that stay (``unread``), endpoints
    that cannot be made now, hooks that cannot be attached again, and what cannot be saved.
    """

    endpoints: list[str] = field(default_factory=list)
    attached: list[str] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    set_aside: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    state: SavedState = field(default_factory=SavedState)
    unread: list[str] = field(default_factory=list)

    @property
    def may_succeed_later(self) -> bool:
        """Whether something may succeed though no cgroup is made that is watched for: it is to be tried again after a
        time. An engine may make a container anywhere.
        """
        return bool(self.problems) or any(why != NOT_THERE or _is_engines(one) for one, why in self.waiting.items())


def is_absent(why: str) -> bool:
    """Whether one that waits for this reason is not there."""
    return why == NOT_THERE or why.startswith(f"{ANOTHERS} ")


def _is_engines(text: str) -> bool:
    return text.partition(":")[0] in WITH_IDS


def restore(graft: Installation, sightings: Sightings | None = None) -> Restored:
    """Make the endpoints and attach the containers that are saved, as far as that is possible now.

    With ``sightings``: a container that is just starting may not be in its own network namespace yet, so until it has
    settled it has to have the transport that it had; and no file is set aside, of which an operator is to be told.
    Raises RefusedError if others can write what is saved, NotUpError.
    """
    store, done = Store(graft.settings), Restored()
    if not store.exists:
        done.problems = _reap(graft)
        return done
    try:
        _restore(graft, store, sightings, done)
    except Exception as error:
        why_waiting.note(graft.settings, {why_waiting.EACH: f"nothing was restored: {_message(error)}"})
        raise
    others = {why_waiting.EACH: "not all that is saved can be read now"} if done.unread else {}
    why_waiting.note(graft.settings, others | done.waiting)
    return done


def _restore(graft: Installation, store: Store, sightings: Sightings | None, done: Restored) -> None:
    with store.locked(saves=False):
        store.tidy()
        saving.remove_left(graft, is_alone=True)
        done.state, bad = store.read()
        stay = [one for one in bad if one.stays or sightings is not None]
        done.unread = [f"{one.line}; not restored" for one in stay]
        done.set_aside = [store.set_aside(one) for one in bad if one not in stay]
        done.endpoints, problems = _restore_endpoints(graft, store, done.state)
    done.problems = [*done.unread, *problems, *_reap(graft)]
    left = [one for one in done.state.attachments if not store.is_paused(ATTACHMENTS, file_name(one.target))]
    finder = _Finder(graft, done.state.attachments)
    if sightings is not None:
        sightings.forget_others({one.target.text for one in left})
    progress = True
    while left and progress:  # a policy may name an endpoint that the next one declares
        reasons = {one.target.text: _restore_attachment(graft, store, one, finder, sightings, done) for one in left}
        done.waiting = {name: why for name, why in reasons.items() if why is not None}
        progress = 0 < len(done.waiting) < len(left)
        left = [one for one in left if one.target.text in done.waiting]


def _reap(graft: Installation) -> list[str]:
    """Finish what others have left undone; a line for each container that lacks hooks, and cannot get them again."""
    graft.reap()
    return list(lost_hooks.attach_again(graft, graft.containers.listing()).values())


def _restore_endpoints(graft: Installation, store: Store, state: SavedState) -> tuple[list[str], list[str]]:
    """The names of those that were made, and a line for each that could not be."""
    made, problems = [], []
    there = graft.endpoints.by_name()
    for endpoint in state.endpoints:
        if endpoint.name in there or store.is_paused(ENDPOINTS, endpoint.name):
            continue
        try:
            with graft.transaction() as change:
                change.endpoints.add(endpoint)
            made.append(endpoint.name)
        except Exception as error:
            problems.append(f"endpoint {endpoint.name}: not restored: {_message(error)}")
    return made, problems


def _message(error: Exception) -> str:
    if isinstance(error, GraftError):
        return error.message
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"


def _restore_attachment(
    graft: Installation,
    store: Store,
    saved: SavedAttachment,
    finder: _Finder,
    sightings: Sightings | None,
    done: Restored,
) -> str | None:
    """Attach a container, if it is there and not attached. Returns why it waits, None if it does not.

    What a container has asked for itself is no policy of the operator's: it is replaced at that cgroup, and taken away
    below it. What an annotation of the operator's has chosen is replaced, too.
    """
    try:
        found = finder.find(saved)
        if found is None:
            return NOT_THERE
        container = graft.containers.at(found.cgroup)
        asked = [one for one in graft.containers.listing() if _is_asked_below(one, found.cgroup)]
        seen = attached = None
        if container is None or not _is_chosen(container, saved):
            settled = sightings is None or sightings.is_settled(saved.target.text, finder.cgroup_id(found))
            seen = _look_at(graft, found, saved, settled, asked if container is None else None)
            seen.ensure_daemon(graft, store.wanted(saved).policy)
        with nullcontext() if seen is None else seen.within_reach(), store.locked(saves=False):
            current = store.attachment(saved.target)
            if current is None or store.is_paused(ATTACHMENTS, file_name(saved.target)):  # it was detached just now
                return None
            if seen is not None:
                if (current.transport, current.relay) != (saved.transport, saved.relay) or not seen.is_current(graft):
                    return _CHANGED
                relay = current.relay if seen.attached is None else None
                attached = attach_seen(graft, seen, store.wanted(current).policy, relay)
                container = attached.container
                done.attached.append(saved.target.text)
            if container is not None:
                done.problems += _note_last(store, current, found, container)
        for one in asked:  # until now each call was decided by both
            take_away(graft, one)
        if seen is not None and attached is not None and (seen.attached is not None or not attached.is_served):
            return update_relay(graft, seen.attached or attached.container, attached.container) or None
    except Exception as error:  # of this one: the others are restored
        return _message(error)
    return None


def _is_chosen(container: Container, saved: SavedAttachment) -> bool:
    """Whether an attached container has its policy by a command. Not where the runtime attached it when it was made
    again: that chose by its annotation, because it did not know by what name it is saved.
    """
    is_known = container.engine != RUNTIME or saved.last.cgroup == saving.below_mount(container.cgroup_path)
    return container.is_operators and (is_known or saved.target.kind not in WITH_IDS)


def _is_asked_below(container: Container, path: Path) -> bool:
    return not container.is_operators and path in container.cgroup_path.parents


def _look_at(
    graft: Installation,
    found: FoundContainer,
    saved: SavedAttachment,
    settled: bool,
    over: Sequence[Container] | None,
) -> Seen:
    """Look at it for the transport that was asked for, or that it had. Raises GraftError.

    One that had direct is attached in any case when it has settled: it may leave the host's namespace with sockets.
    ``over``: as `look_at` asks for it; None where it is attached by what it asked for, and keeps that transport.
    """
    if over is None:
        return look_at(graft, found, choose=as_attached)
    wanted = saved.transport or saved.last.transport
    if wanted is None and not settled and not members.processes(found.cgroup):
        raise NotFoundError("it has no process yet")
    try:
        return look_at(graft, found, wanted, saved.relay, over=over)
    except RefusedError:
        if not settled or saved.transport not in (None, Transport.DIRECT):
            raise
    if saved.transport is None:
        try:
            return look_at(graft, found, None, saved.relay, over=over)
        except RefusedError:
            if saved.last.transport is not Transport.DIRECT:
                raise
    return look_at(graft, found, Transport.DIRECT, saved.relay, stay_direct, over)


def look_for(
    graft: Installation, attachments: Sequence[SavedAttachment], among: Sequence[SavedAttachment] = ()
) -> tuple[dict[Target, FoundContainer], dict[Target, str]]:
    """Where these are, of those that are there; and of which that cannot be known, with the reason. Under no lock.
    ``among``: all that are saved, where these are some of them.
    """
    finder, found, unknown = _Finder(graft, among or attachments), dict[Target, FoundContainer](), dict[Target, str]()
    for one in attachments:
        try:
            place = finder.find(one)
        except AnothersError:
            continue
        except Exception as error:  # of this one: the others are looked for
            unknown[one.target] = _message(error)
        else:
            found |= {} if place is None else {one.target: place}
    return found, unknown


def _note_last(store: Store, saved: SavedAttachment, found: FoundContainer, container: Container) -> list[str]:
    """Save where a container is now. Gives the line that says why that cannot be: it is attached all the same."""
    now = saving.of_attached(found, saved.policy, container.transport, saved.transport, saved.relay)
    if now is None:
        return []
    try:
        saving.note_last(store, saved, now.last)
    except GraftError as error:
        return [f"{saved.target.text}: where it is now was not saved: {error.message}"]
    return []


class AnothersError(NotFoundError):
    """The container that has a saved one's name now is another saved one: that is where it was last seen."""


class _Finder:
    """Finds the cgroups of saved containers: where they were last seen, or by asking an engine. ``attachments`` are all
    that are saved and can be read, those too that nobody asks for.
    """

    def __init__(self, graft: Installation, attachments: Sequence[SavedAttachment]) -> None:
        self._top, self._saved = cgroup.v2_mount(), attachments
        paths = [path for one in attachments if (path := self._last_path(one)) is not None]
        seen = ask_of_each(cgroup_id_at, paths)
        self._there = {path: number for path, number in seen.items() if number}
        self._unknown = set(paths) - seen.keys()
        attached = [one for one in graft.containers.listing() if one.is_operators]
        self._known = {one.cgroup_path.name for one in attached if one.cgroup_path in paths}
        self._silent: dict[str, str] = {}

    def _last_path(self, saved: SavedAttachment) -> Path | None:
        """Where a container was, if its folder has a name that no other one's would have."""
        if saved.target.kind == "cgroup":
            return self._top / saved.target.name
        path = self._top / saved.last.cgroup
        mark = saved.target.name if saved.target.kind == "unit" else saved.last.id
        return path if mark and mark in path.name else None

    @cached_property
    def _strangers(self) -> tuple[bool, list[str]]:
        """Whether there are cgroups of containers that are not known to be one of these; and the folders that somebody
        holds, where some may be. One that is attached may be one of these all the same, attached by another name.
        """
        names, held = container_folders(self._top)
        return not self._known.issuperset(names), [str(self._top / name) for name in held]

    def find(self, saved: SavedAttachment) -> FoundContainer | None:
        """The container; None if it is not there. Raises AnothersError if another one has its name; GraftError if that
        cannot be known: its engine does not answer, or somebody holds a folder where it may be.
        """
        path, target = self._last_path(saved), saved.target
        if path in self._there and path is not None:
            return FoundContainer(path, target.engine, target.name, saved.last.id)
        held = [str(path)] if path in self._unknown else []
        if target.kind in WITH_IDS:
            there_are_strangers, unsearched = self._strangers
            held += unsearched
            found = self._ask(target) if there_are_strangers or held else None
        else:
            found = self._ask(target) if path is None else None
        if found is None and held:
            raise members.held(held[0])
        other = None if found is None else saving.other_seen_at(self._saved, saved, saving.place_of(found))
        if other is not None:
            raise AnothersError(f"{ANOTHERS} {other.target.text}")
        return found

    def cgroup_id(self, found: FoundContainer) -> int:
        """The id of the cgroup of a container that was found. Raises KernelError where somebody holds a folder above,
        FileNotFoundError.
        """
        path = found.cgroup
        return self._there.get(path) or members.answer_about(str(path), lambda: cgroup.cgroup_id(path))

    def _ask(self, target: Target) -> FoundContainer | None:
        """The container of this very name: engines also answer for one whose id begins so.

        An error that concerns one container is no reason not to ask for the others: its image, or who holds the folder
        in /proc of one of its processes (podman's command looks there), can cause it.
        """
        if target.kind in self._silent:
            raise KernelError(self._silent[target.kind])
        try:
            found = resolve(target.text)
        except NotFoundError:
            return None
        except NoAnswerError as error:
            if target.kind not in WITH_IDS or is_silent(target.kind):
                self._silent[target.kind] = error.message
            raise
        return None if target.kind in WITH_IDS and found.name != target.name else found
