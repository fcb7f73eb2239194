"""`graft policy apply`: replaces the policy of attached containers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from graft.commands import saving, unread
from graft.commands.cut_off import cut_off
from graft.commands.find import find
from graft.commands.policy_source import with_current
from graft.errors import GraftError, KernelError, NotFoundError, UnfinishedError
from graft.model.transport import Transport
from graft.policy.model import Origin, Policy, PolicyError
from graft.policy.validator import check_splice, needs_unix_relay
from graft.saved.model import SavedAttachment
from graft.saved.store import ATTACHMENTS, BadFile, Store, file_name
from graft.splice import client as splice
from graft.state import lost_hooks, members
from graft.state.compiled_policy import CompiledPolicy, check_transport
from graft.state.container_changes import Exchanged
from graft.state.installation import Installation
from graft.state.records import PAIRS, Container


@dataclass(frozen=True, slots=True)
class Applied:
    """Containers with a new policy: those that are attached, those that are saved and wait, and, after the next boot,
    those that have another one ``for_now``, or are ``detached`` for now (`--no-save`). ``unserved``: those of the first
    that graftd does not serve by it yet, each with the reason. ``cut_off``: a line for each container that had asked
    for an endpoint that the policy declares anew.
    """

    containers: list[Container]
    waiting: list[SavedAttachment]
    for_now: list[SavedAttachment]
    detached: list[SavedAttachment]
    unserved: list[str]
    cut_off: list[str]


def apply(graft: Installation, policy: Policy, text: str | None = None, save: bool = False) -> Applied:
    """Replace the policy of the container ``text``, or of every container whose policy has the same name.

    ``save``: for the next boot too; without, those of them that are saved have it until then, also when they start
    again. Those that wait get it too; for those that are saved under that name, and have another policy for now, it is
    saved. A file that changes until its rules are in force is applied again. Raises NotFoundError if there is none,
    PolicyError, RefusedError, ConflictError, KernelError, and changes nothing then, unless the error is about that file
    (`with_current`); UnfinishedError if one of them does not get it, or what is saved of one may not be found.
    """
    return with_current(graft, policy, lambda current: _apply_once(graft, current, text, save))


def _apply_once(graft: Installation, policy: Policy, text: str | None, save: bool) -> Applied:
    """All of it is done under the lock on what is saved: nobody restores a container by the old policy meanwhile."""
    graft.reap()
    compiled = graft.compile(policy)
    found = None
    if text is not None and not saving.find_each_waiting(graft, policy.name, text, save):
        found = find(graft, text)
    chosen = _Choice([found], [], [], [], []) if found is not None else _choose(graft, compiled, text, save)
    unhooked = lost_hooks.attach_again(graft, chosen.containers)
    with _within_reach(chosen.containers, compiled) as reached, saving.alone(graft.settings, save) as is_alone:
        saving.remove_left(graft, is_alone)
        if found is None:  # others attach and detach
            chosen = _choose(graft, compiled, text, save)
        job = _Job(graft, compiled, text is None, save, reached, unhooked, [*chosen.unread])
        job.run(chosen)
        job.failed += job.unfound(chosen)
    unserved = [update_relay(graft, before, container) for before, container in job.changed]
    if job.failed or chosen.kept:
        raise _unfinished(policy, job, chosen)
    containers = [container for _, container in job.changed]
    lost = cut_off(graft, {one.name for one in policy.endpoints})
    return Applied(containers, job.waiting, chosen.for_now, job.detached, [one for one in unserved if one], lost)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Those that are to get a policy: attached, waiting, or saved with another one ``for_now``. ``kept``: a line for
    each that keeps the one it has; ``unread``: files that may be what is saved of others.
    """

    containers: list[Container]
    waiting: list[SavedAttachment]
    for_now: list[SavedAttachment]
    kept: list[str]
    unread: list[BadFile]


def _choose(graft: Installation, compiled: CompiledPolicy, text: str | None, save: bool) -> _Choice:
    """Every container under a policy of that name, or (``text``) the one that waits.

    By its name, a container that has asked for its policy itself gets no policy that is not open to those that ask; and
    it keeps the operator from nothing. Raises NotFoundError, RefusedError, PolicyError.
    """
    policy = compiled.policy
    store = Store(graft.settings)
    state, bad = store.read()
    waiting = saving.find_each_waiting(graft, policy.name, text, save, state)
    chosen, kept = list[Container](), list[str]()
    if text is None:
        for one in graft.containers.listing():
            if one.policy == policy.name and one.origin != PAIRS:  # whose policy is of nobody's file
                obstacle = _obstacle(one, compiled)
                kept += obstacle
                chosen += [] if obstacle else [one]
    if text is None or waiting:
        kept += [f"a container may keep its policy: {one.message}" for one in graft.containers.read_all()[1]]
    for_now = saving.saved_otherwise(graft, policy.name, waiting, state) if text is None and save else []
    if not chosen and not waiting and not for_now and not kept and not unread.beside(store, bad, (), save):
        raise NotFoundError(
            f"no container has a policy named {policy.name!r}", "graft ps lists them; --cgroup chooses one"
        )
    return _Choice(chosen, waiting, for_now, kept, bad)


def _obstacle(container: Container, compiled: CompiledPolicy) -> list[str]:
    """A line that says why one that has asked for its policy keeps that. Raises what `_check` raises for others."""
    if container.is_operators:
        _check(container, compiled)
        return []
    if not compiled.policy.open:
        return [f"{container.name} has asked for its policy itself, and keeps that: this one is not open"]
    try:
        _check(container, compiled)
    except GraftError as error:
        return [f"{container.name}: {error.message}"]
    return []


def _check(container: Container, compiled: CompiledPolicy) -> None:
    """Raises RefusedError and PolicyError if the container cannot have the policy."""
    if container.transport is Transport.SPLICE:
        refuse_in_splice(compiled.policy)
    check_transport(container.transport, container.name, compiled)


@contextlib.contextmanager
def _within_reach(containers: Sequence[Container], compiled: CompiledPolicy) -> Iterator[Collection[int]]:
    """For the block that gives them a policy. Gives those, of which a cgroup has to be looked up, that can be reached:
    to find out takes time where somebody holds a folder.
    """
    with contextlib.ExitStack() as stack:
        new = [one for one in containers if _attaches(one, compiled)]
        yield {one.id for one in new if stack.enter_context(members.pinned(one.cgroup_path))}


def _attaches(container: Container, compiled: CompiledPolicy) -> bool:
    """Whether a container gets hooks that it has not had."""
    return not container.is_relayed and needs_unix_relay(compiled.policy, compiled.endpoints)


@dataclass(slots=True)
class _Job:
    """One policy for many containers, under the lock on what is saved."""

    graft: Installation
    compiled: CompiledPolicy
    by_name: bool
    save: bool
    reached: Collection[int]
    unhooked: Mapping[int, str]
    """Those that lack hooks, each with a line that says why it cannot get them again."""
    unread: list[BadFile]
    """What is saved, and cannot be read."""
    changed: list[tuple[Container, Container]] = field(default_factory=list)
    """Each as it was, and as it is."""
    waiting: list[SavedAttachment] = field(default_factory=list)
    detached: list[SavedAttachment] = field(default_factory=list)
    """Those that nobody attaches in this boot."""
    failed: list[str] = field(default_factory=list)
    """A line for each that has not got it."""

    def run(self, chosen: _Choice) -> None:
        """Raises GraftError where nothing was changed."""
        together = {container.id for container in chosen.containers}
        with saving.saved_of_each(self.graft.settings, chosen.for_now, self.compiled.policy):
            for container in chosen.containers:
                self._replace(container, together)
            for saved in chosen.waiting:
                self._replace_saved(saved)

    def _replace(self, container: Container, together: Collection[int]) -> None:
        """One that has ended meanwhile is one that waits, if it is saved. Where the first one fails, nothing was done;
        the others have lost an endpoint that is declared anew, and get the new one.
        """
        graft = self.graft
        if _attaches(container, self.compiled) and container.id not in self.reached:
            self.failed.append(f"{container.name} has just started, or somebody holds its folder")
            return
        if container.id in self.unhooked:
            self.failed.append(self.unhooked[container.id])
            return
        try:
            with saving.policy_of(graft.settings, container, self.compiled.policy, self.save) as bad:
                self.unread += bad
                self.changed.append((container, self._put_in_force(container, together)))
        except NotFoundError as error:
            saved = saving.of_ended(Store(graft.settings), container, self.compiled.policy)
            if graft.ruleset_of(container):
                self.failed.append(f"{container.name}: {error.message}")
            elif saved is not None:
                self._replace_saved(saved)
            elif len(together) == 1:
                raise
            elif is_listed(graft, container):
                self.failed.append(f"{container.name} keeps its policy until it ends: its maps are lost")
        except (GraftError, OSError) as error:
            if not self.changed and container.is_operators:
                raise
            self.failed.append(f"{container.name}: {error}")

    def unfound(self, chosen: _Choice) -> list[str]:
        """A line for each file that may be what is saved of one that is to have the policy, by a name that is not known
        here: it starts again by that as soon as it can be read.
        """
        names = unread.certain(name for one in chosen.containers for name in saving.names_of(one))
        names |= {one.target for one in (*self.waiting, *self.detached, *chosen.for_now)}
        lines = unread.beside(Store(self.graft.settings), self.unread, names, self.save)
        return [f"what is saved here may be of one of them: {line}" for line in dict.fromkeys(lines)]

    def _put_in_force(self, container: Container, together: Collection[int]) -> Container:
        """By its name alone a container's policy stays one that it has asked for."""
        is_operators = container.is_operators or not self.by_name
        policy = replace(self.compiled.policy, origin=Origin.OPERATOR if is_operators else Origin.ASKED)
        return _replace(self.graft, container, replace(self.compiled, policy=policy), together=together)

    def _replace_saved(self, saved: SavedAttachment) -> None:
        saving.replace_waiting(self.graft.settings, saved, self.compiled.policy, self.save)
        is_paused = Store(self.graft.settings).is_paused(ATTACHMENTS, file_name(saved.target))
        (self.detached if is_paused else self.waiting).append(saved)


def _unfinished(policy: Policy, job: _Job, chosen: _Choice) -> UnfinishedError:
    done = [container.name for _, container in job.changed]
    done += [one.target.text for one in (*job.waiting, *job.detached)]
    lines = "; ".join([*job.failed, *chosen.kept])
    hint = "graft detach, or --cgroup gives it the policy" if chosen.kept else ""
    return UnfinishedError(f"policy {policy.name}: {lines}" + (f"; it is that of {', '.join(done)}" * bool(done)), hint)


def is_listed(graft: Installation, container: Container) -> bool:
    """Whether one that is in no map has not ended: its data plane is gone, and its supervisor keeps the old maps."""
    return container.id in {one.id for one in graft.containers.listing()}


def refuse_in_splice(policy: Policy) -> None:
    """Raises PolicyError for a policy that transport splice cannot serve."""
    problems = check_splice(policy)
    if problems:
        raise PolicyError(policy.name, problems)


def update_relay(graft: Installation, before: Container, container: Container) -> str:
    """Have graftd serve a container by its new policy, which is in force, or not any more. Gives what is wrong, where
    it does not do so yet. A container may delay it: not to be called under a lock.
    """
    try:
        if container.is_relayed:
            splice.attach(graft.settings, container)
        elif before.is_relayed:
            splice.detach(graft, container)
    except GraftError as error:
        return f"{container.name}: {error.message}"
    return ""


def check_served(unserved: Sequence[str]) -> None:
    """Raises UnfinishedError for containers that graftd does not serve by their policies yet."""
    if unserved:
        message = f"in force, but graftd does not serve by it yet: {'; '.join(unserved)}"
        raise UnfinishedError(message, "it does when it gets to it; graft ps tells")


def replace_policy(
    graft: Installation,
    container: Container,
    policy: Policy,
    name: str | None = None,
    relay: str | None = None,
    together: Collection[int] = (),
) -> Container:
    """Replace a container's policy in the maps; graftd is to be told afterwards. Raises what `apply` raises.

    ``name``, ``relay``: the new ones, None to keep them. ``together``: containers that get the same policy with it, or
    others that may be in its way.
    """
    compiled = graft.compile(policy)
    with _reach(container, compiled):
        return _replace(graft, container, compiled, name, relay, together)


def exchange_policy(
    graft: Installation, container: Container, policy: Policy, together: Collection[int], kept: Collection[int]
) -> Exchanged:
    """As `replace_policy`, to be completed or undone: the old rules stay until then. ``kept``: those of others."""
    compiled = graft.compile(policy)
    _check(container, compiled)
    ensure_hooks(graft, container)
    with _reach(container, compiled), graft.transaction() as change:
        return change.containers.exchange(container, compiled, together=together, kept=kept)


def ensure_hooks(graft: Installation, container: Container) -> None:
    """Raises KernelError where it lacks hooks, and cannot get them again: its rules would be in force for nothing."""
    for problem in lost_hooks.attach_again(graft, [container]).values():
        raise KernelError(problem, "graft detach")


def _reach(container: Container, compiled: CompiledPolicy) -> AbstractContextManager[None]:
    """For the block that gives it a policy: a cgroup may have to be looked up."""
    return members.within_reach(container.cgroup_path) if _attaches(container, compiled) else contextlib.nullcontext()


def _replace(
    graft: Installation,
    container: Container,
    compiled: CompiledPolicy,
    name: str | None = None,
    relay: str | None = None,
    together: Collection[int] = (),
) -> Container:
    """`replace_policy` of one that is within reach."""
    if container.transport is Transport.SPLICE:
        refuse_in_splice(compiled.policy)
    with graft.transaction() as change:
        return change.containers.apply(container, compiled, name, relay, together)
