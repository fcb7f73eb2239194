"""After an upgrade: puts this Graft's hooks in the place of those in force (graft/datapath/renewal.py).

A folder of a cgroup may be held by whoever may list it, and whoever looks it up waits then. So a child does that, with
a timeout; under the lock, because what is attached meanwhile would have the hooks of before.

The watcher works by the code that it was started with, so it is started anew with this Graft's, also where the hooks
are the same in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from graft.commands import watcher_process
from graft.datapath import attachments, dataplane, renewal
from graft.errors import KernelError
from graft.kernel import cgroup
from graft.model.settings import Settings
from graft.state import helper_process, records

_TIMEOUT = 2.0  # seconds without an answer about any cgroup, whose folder somebody may hold
_SEARCH_TIMEOUT = 10.0


def problem(settings: Settings) -> str:
    """What is wrong with the hooks in force; empty where they are this Graft's. Raises NotUpError."""
    try:
        dataplane.check_supervised(settings)
    except KernelError:
        return "they are not all attached to the cgroup of supervisors: what these make is not confined"
    return "" if renewal.is_current(settings) else "those in force are of another version of Graft"


def renew(settings: Settings) -> None:
    """Replace the hooks in force, and the watcher that runs, where they are not this Graft's. Containers, rules and
    connections stay as they are.

    Raises what `renewal.pin_new` raises, then nothing is changed, and KernelError where a container still has the old
    ones, which it names, or the watcher of before does not end; the next call tries again.
    """
    if renewal.is_current(settings):
        watcher_process.restart_another_versions(settings)
        return
    with dataplane.locked(settings):
        if renewal.is_current(settings):
            return
        try:
            digest = renewal.pin_new(settings)
        except OSError as error:
            raise KernelError(f"cannot replace the hooks: {error.strerror}", "graft doctor") from error
        left = _left_after(settings)
        if left:
            raise KernelError(
                f"the hooks of another version are still in force for {', '.join(left)}: somebody holds the directory",
                "`graft up` again when it is free",
            )
        watcher_process.restart(settings)  # before this is noted: who is killed here has the next one do it
        renewal.note(settings, digest)


def _left_after(settings: Settings) -> list[str]:
    """Replace the hooks of each cgroup that they are attached to; the names of those of which that was not possible."""
    places = [*_own(settings), *((one.name, one.cgroup_path, one.cgroup_id) for one in records.read_all(settings)[0])]
    done = helper_process.run_each(lambda one: attachments.renew(settings, one[1], one[2]), places, _TIMEOUT).results
    left = [name for index, (name, _, _) in enumerate(places) if index not in done]
    if not attachments.scope_ids(settings) <= {number for _, _, number in places}:  # of a container without a record
        found = helper_process.run_each(lambda _: _renew_all(settings), (None,), _SEARCH_TIMEOUT).results
        left += [] if found else ["cgroups that have no record"]
    return left


def _own(settings: Settings) -> Iterator[tuple[str, Path, int]]:
    """The name, path and id of each of Graft's own."""
    for path in (dataplane.supervisors_cgroup(settings), dataplane.relays_cgroup(settings)):
        with contextlib.suppress(FileNotFoundError):
            yield path.name, path, cgroup.cgroup_id(path)


def _renew_all(settings: Settings) -> None:
    for path in attachments.attached_cgroups(settings):
        attachments.renew(settings, path)
