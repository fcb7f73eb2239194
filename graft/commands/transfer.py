"""`graft export`, `graft import`: the whole of what is saved, as YAML.

An import makes the machine what the file says: endpoints are made, changed and deleted, containers attached, given
other policies, and detached. Which of those that are attached the file names is found out first (identified.py). It is
all or nothing:

    1. the file is read and every policy in it checked; what is to be saved is written beside what is saved
    2. endpoints are made and changed, attached containers given their policies; each step has one that undoes it
    3. what was written is put in the place of what was saved, in one step
    4. containers that the file does not have are detached, endpoints deleted, and other containers attached

Steps 1 to 3 are undone if anything fails. Step 4 takes away what was looked at before, and attaches as `graft up` does:
what cannot be attached waits, and what is there and not as the file says is named. What it takes away is noted in step
3: where it is ended, the next import does it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from graft.commands import identified, saving, watcher_process
from graft.commands.detach import stop_serving
from graft.commands.identified import Looked
from graft.commands.policy_apply import exchange_policy, is_listed, update_relay
from graft.commands.restore import is_absent, restore
from graft.commands.up import bring_up
from graft.datapath import rulesets
from graft.errors import ConflictError, KernelError, NotFoundError, UnfinishedError, UsageError
from graft.kernel.atomic_file import write_atomically
from graft.kernel.credentials import require_root
from graft.model.endpoint import Endpoint
from graft.model.settings import Settings
from graft.policy.model import PolicyError, Problem
from graft.saved.model import SavedAttachment, SavedState, Target, outlives_boot
from graft.saved.store import Store
from graft.saved.text import MAX_BYTES, export_text, import_text
from graft.state import dropped, inventory, members
from graft.state.container_changes import ContainerChanges, Exchanged
from graft.state.dropped import Dropped
from graft.state.endpoints import EndpointChanges, Replaced
from graft.state.installation import Installation
from graft.state.records import Container
from graft.state.withdrawal import withdraw


def exported(settings: Settings) -> tuple[str, list[str]]:
    """What is saved, as text; and a line for each file that cannot be read. Raises RefusedError."""
    state, bad = Store(settings).read()
    return export_text(state), [f"{one.line}; left out" for one in bad]


def export_to(path: Path, text: str) -> None:
    """Write an export to a file that only its owner can read, in one step. Raises UsageError."""
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def read_export(path: Path) -> SavedState:
    """The state in a file. Raises NotFoundError, PolicyError with every problem and its line."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode()
    except FileNotFoundError:
        raise NotFoundError(f"{path} not found") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    if not text.strip():
        raise UsageError(f"{path} is empty", "a file of `graft export`")
    state = import_text(text, str(path))
    if of_process := [one for one in state.endpoints if not outlives_boot(one)]:
        message = "a process's namespace ends with it"
        raise PolicyError(
            str(path), [Problem(None, f"endpoints.{one.name}.netns", message, "a name") for one in of_process]
        )
    return state


@dataclass(slots=True)
class Imported:
    """What an import did, by name."""

    made: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    attached: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    unserved: list[str] = field(default_factory=list)
    """Containers that graftd does not serve by their new policies yet, or may still serve, each with the reason."""
    kept: list[str] = field(default_factory=list)
    """Those that have kept their policies: attached by others, or with maps that are lost."""

    def check_in_force(self) -> None:
        """Raises UnfinishedError for containers that are, or may be, there, and not under the policies of the file."""
        left = [f"{name} waits: {why}" for name, why in sorted(self.waiting.items()) if not is_absent(why)]
        left += [f"{name} keeps the policy that it has" for name in self.kept]
        if left:
            raise UnfinishedError(f"saved, but not in force: {'; '.join(left)}", "graft ps, graft import again")

    def lines(self) -> list[str]:
        """A line for each kind of change that there was."""
        lists = {
            "endpoints made": self.made,
            "endpoints changed": self.changed,
            "endpoints deleted": self.deleted,
            "attached": self.attached,
            "policy replaced": self.replaced,
            "detached": self.detached,
        }
        lines = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
        lines += [f"{name} waits: {why}" for name, why in sorted(self.waiting.items())]
        return lines or ["nothing to change"]


def import_state(settings: Settings, state: SavedState) -> Imported:
    """Make ``state`` what is saved and what is in force. Raises GraftError; nothing is changed then."""
    require_root()
    bring_up(settings)
    store = Store(settings)
    with Installation(settings) as graft:
        graft.reap()
        looked = identified.look(graft, state, store.read()[0])  # a container can prolong that: under no lock
        with store.locked():
            job = _Import(graft, store, looked)
            job.change()
        job.take_away()
        done = job.tell_graftd()  # and that, and what follows
        reasons = restore(graft).waiting
        left = {one.target.text for one in saving.waiting(graft)}  # the watcher may have attached others meanwhile
        done.waiting = {name: why for name, why in reasons.items() if name in left}
        job.look_again(left)
    if state.attachments:
        watcher_process.ensure_running(settings)
    return done


def _all_saved(store: Store) -> SavedState:
    """What an import takes the place of. Raises KernelError where not all of it can be read: that would be lost."""
    state, bad = store.read()
    if bad:
        raise KernelError(f"{bad[0].line}; nothing was changed", "move it away, to import without it")
    return state


class _Import:
    """One import. `change` is called under the lock on what is saved, the rest under none."""

    def __init__(self, graft: Installation, store: Store, looked: Looked) -> None:
        self._graft, self._store, self._looked = graft, store, looked
        self._before = _all_saved(store)
        self._wanted = {one.target: saving.wanted_or_saved(store, one).policy for one in self._before.attachments}
        self._left = dropped.noted(graft.settings)
        self._listed = {one.id: one for one in graft.containers.listing()}
        self._mine = self._identified()
        self._state = identified.seen_at(looked, self._mine)
        self._done = Imported()
        self._missing: list[Target] = []
        self._removed: list[Container] = []
        self._exchanged: list[Exchanged] = []
        self._undo: list[tuple[str, Callable[[], object]]] = []
        self._replaced_endpoints: list[Replaced] = []

    def change(self) -> None:
        """Make all of it, or nothing, but for what has to go then."""
        self._removed = self._to_be_removed()
        self._refuse_removing_unknown(self._removed)
        self._refuse_deleting_used(self._removed)
        with self._graft.transaction() as changes:
            changes.containers.remove_left()
        with self._for_now_changed():
            prepared = self._store.prepare_all(self._state)
            self._undo.append(("what is saved", prepared.undo))
            try:
                self._change_endpoints()
                self._replace_policies()
                self._note_dropped()
                self._store.put_in_place(prepared)
            except BaseException as error:
                if left := self._roll_back():
                    why = str(error) or type(error).__name__
                    raise UnfinishedError(
                        f"{why}; not changed back: {'; '.join(left)}", "graft ps, graft ep show"
                    ) from error
                raise
        prepared.finish()
        self._store.resume_all()  # nothing can fail any more: what was taken away for now is wanted again
        for done in self._exchanged:
            self._of_containers(partial(ContainerChanges.complete, done=done))
        for replaced in self._replaced_endpoints:
            self._under_lock(partial(EndpointChanges.complete, done=replaced))

    @contextlib.contextmanager
    def _for_now_changed(self) -> Iterator[None]:
        """For the block that puts the policies of the file in force: have them in what is noted for now of containers,
        whatever they are saved as, until the notes go with what was saved before (`Store.for_now_changed`).
        """
        there = saving.container_of_each(self._before.attachments, [*self._listed.values()])
        by_name = {one.target: one.policy for one in self._state.attachments}
        by_number = {container.id: by_name[target] for target, container in self._mine.items()}
        with contextlib.ExitStack() as stack:
            for one in self._before.attachments:
                number = there[one.target].id if one.target in there else 0
                policy = by_number.get(number) or by_name.get(one.target)
                if policy is not None:
                    stack.enter_context(self._store.for_now_changed(one, policy))
            yield

    def look_again(self, left: Collection[str]) -> None:
        """Note which of those that were not found are attached now: all but ``left``. One that was attached before all
        the same, and is as it was, has kept its policy.
        """
        now = saving.container_of_each(self._store.read()[0].attachments, self._graft.containers.listing())
        for target in (one for one in self._missing if one.text not in left):
            container = now.get(target)
            is_as_before = container is not None and self._listed.get(container.id) == container
            (self._done.kept if is_as_before else self._done.attached).append(target.text)

    def _note_dropped(self) -> None:
        """Note what has to go, which nothing that is saved tells of from here on."""
        names, gone = self._saved_as(), self._deleted()
        containers = {one.id: names[one.id] for one in self._removed if one.id in names}
        endpoints = {one.endpoint.name: one.id for one in self._graft.endpoints.listing() if one.endpoint.name in gone}
        self._undo.append(("what is to be taken away", partial(dropped.note, self._graft.settings, self._left)))
        dropped.note(self._graft.settings, Dropped(containers, endpoints))

    def take_away(self) -> None:
        """Detach the containers that were saved, and are not any more, as `graft detach`, and delete the endpoints.

        The rules of all go first: what comes then a container can prolong.
        """
        graft = self._graft
        with inventory.host_stack(graft) as stack:  # removing a container may remove endpoints
            removed = [one for one in self._removed if self._remove(one)]
            with self._store.locked():
                self._delete_endpoints()
                dropped.forget(graft.settings)
            for one in removed:
                problem = stop_serving(graft, one) if one.is_relayed else ""
                self._note_unserved(f"{one.name}: {problem}" if problem else "")
                withdraw(graft, one, stack, False)

    def tell_graftd(self) -> Imported:
        """Have graftd serve by the policies that were replaced. Returns what the import did."""
        for done in self._exchanged:
            self._note_unserved(update_relay(self._graft, done.before, done.after))
        return self._done

    def _note_unserved(self, message: str) -> None:
        if message:
            self._done.unserved.append(message)

    def _roll_back(self) -> list[str]:
        """Undo all that can be undone. Returns a line for each change that could not be."""
        failed = []
        for what, undo in reversed(self._undo):
            try:
                undo()
            except Exception as error:  # of this one: the others are undone
                failed.append(f"{what}: {error}")
        return failed

    # ---- endpoints ------------------------------------------------------------------------------

    def _change_endpoints(self) -> None:
        there = {one.endpoint.name: one for one in self._graft.endpoints.listing()}
        for endpoint in self._state.endpoints:
            old = there.get(endpoint.name)
            if old is None:
                self._under_lock(partial(EndpointChanges.add, endpoint=endpoint))
                undo = partial(EndpointChanges.delete, name=endpoint.name, force=True)
                self._undo.append((f"endpoint {endpoint.name}", partial(self._under_lock, undo)))
                self._done.made.append(endpoint.name)
            elif old.declared or old.endpoint != endpoint:
                self._replace(endpoint)
                self._done.changed.append(endpoint.name)

    def _replace(self, endpoint: Endpoint) -> None:
        """A superseded one stays, without its name, until nothing can fail any more."""
        with self._graft.transaction() as changes:
            asked, old = changes.containers.asked_rulesets(), changes.endpoints.find(endpoint.name)
            if old.declared and not rulesets.using(self._graft.maps, old.id) <= asked:
                raise ConflictError(f"endpoints.{endpoint.name}: a policy declares it", "detach its container first")
            done = changes.endpoints.replace(endpoint, asked, changes.containers.own_rulesets())
        self._replaced_endpoints.append(done)
        undo = partial(self._under_lock, partial(EndpointChanges.undo, done=done))
        self._undo.append((f"endpoint {endpoint.name}", undo))

    def _under_lock(self, change: Callable[[EndpointChanges], object]) -> None:
        with self._graft.transaction() as changes:
            change(changes.endpoints)

    def _deleted(self) -> list[str]:
        """Endpoints that were saved, and are not to be any more; and those that an import has left."""
        kept, saved = ({one.name for one in state.endpoints} for state in (self._state, self._before))
        there = {one.endpoint.name: one.id for one in self._graft.endpoints.listing()}
        left = {name for name, number in self._left.endpoints.items() if there.get(name) == number}
        return sorted((left | saved.intersection(there)) - kept)

    def _delete_endpoints(self) -> None:
        for name in self._deleted():
            if not self._store.has_endpoint(name):  # nobody has saved it again
                self._under_lock(partial(EndpointChanges.delete, name=name, force=True))
                self._done.deleted.append(name)

    def _refuse_deleting_used(self, removed: list[Container]) -> None:
        """Raises ConflictError if a container that stays, and is not saved, uses an endpoint that is to be deleted.

        What a container has asked for itself keeps the operator from nothing.
        """
        gone = set(self._deleted())
        own = {one.id for one in (*removed, *self._mine.values())}
        for container in self._graft.containers.listing():
            used = gone.intersection(container.endpoints)
            if used and container.id not in own and container.is_operators:
                names = ", ".join(sorted(used))
                raise ConflictError(f"{container.name} uses {names}, which the file does not have", "graft ps")

    # ---- containers -----------------------------------------------------------------------------

    def _saved_as(self) -> dict[int, str]:
        """What each container is saved as that is attached now, by its number; or was, when an import was ended."""
        there = saving.container_of_each(self._before.attachments, [*self._listed.values()])
        left = {number: name for number, name in self._left.containers.items() if number in self._listed}
        return left | {one.id: target.text for target, one in there.items()}

    def _identified(self) -> dict[Target, Container]:
        """The attached container of each attachment of the file. What a container has asked for itself is none of the
        operator's: where the file has a policy for it, that takes its place as `graft up` has it do.
        """
        names = self._saved_as()
        attached = [one for one in self._listed.values() if one.is_operators or one.id in names]
        return identified.identify(self._looked, attached, names)

    def _to_be_removed(self) -> list[Container]:
        kept, names = {one.id for one in self._mine.values()}, self._saved_as()
        return [one for one in self._listed.values() if one.id in names and one.id not in kept]

    def _refuse_removing_unknown(self, removed: Collection[Container]) -> None:
        """Raises KernelError where one that is to be detached may be one that the file has by another name."""
        for target, why in self._looked.unknown.items():
            some = [one.name for one in removed if target not in self._mine and identified.may_be(target, one)]
            if some:
                message = f"where {target.text} is cannot be known ({why}): it may be one of those to be detached"
                raise KernelError(f"{message}, {', '.join(some)}", "try again, or detach them first: graft detach")

    def _replace_policies(self) -> None:
        """Give each attached container the policy of the file: another may be in force than the one that was saved."""
        together, done = {one.id for one in self._mine.values()}, set[int]()
        for one in self._state.attachments:
            container = self._mine.get(one.target)
            if container is None:
                self._missing.append(one.target)
            elif container.id not in done:  # of two names for one, which have one policy
                done.add(container.id)
                try:
                    self._exchange(one, container, together)
                except NotFoundError:
                    if self._graft.ruleset_of(container):
                        raise
                    if is_listed(self._graft, container):  # its maps are lost: it goes by them until it ends
                        self._done.kept.append(one.target.text)
                    continue  # else it has ended, and waits from here on
                if self._wanted.get(one.target) != one.policy:
                    self._done.replaced.append(one.target.text)

    def _exchange(self, one: SavedAttachment, container: Container, together: Collection[int]) -> None:
        """The old rules stay until nothing can fail any more, so that those come back that were in force."""
        kept = {done.ruleset for done in self._exchanged}
        named = identified.as_named(one.target, container)
        done = replace(exchange_policy(self._graft, named, one.policy, together, kept), before=container)
        self._exchanged.append(done)
        undo = partial(self._of_containers, partial(ContainerChanges.undo, done=done))
        self._undo.append((one.target.text, undo))

    def _of_containers(self, change: Callable[[ContainerChanges], object]) -> None:
        with self._graft.transaction() as changes:
            change(changes.containers)

    def _remove(self, container: Container) -> bool:
        """Remove a container's rules and hooks, unless somebody has detached it meanwhile, or saved it again."""
        kept = {one.target for one in self._state.attachments}
        with members.pinned(container.cgroup_path) as reachable, self._store.locked():
            saved = saving.at(self._store, container.cgroup_path)
            is_there = container.id in {one.id for one in self._graft.containers.listing()}
            if not is_there or (saved is not None and saved.target not in kept):
                return False
            self._of_containers(partial(ContainerChanges.remove, container=container, reachable=reachable))
        self._done.detached.append(container.name)
        return True
