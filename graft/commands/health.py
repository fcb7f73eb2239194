"""What is wrong with an installation, and how it is mended: by `graft doctor --fix`, or by a command that is named.

Each thing is asked of the kernel or the process that it is about, and what mends it is what the other commands do.
Nothing here grants anything: an installation that is mended has the rules that were in force or saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from graft.commands import renew, up, watcher_process
from graft.datapath import dataplane
from graft.errors import ConflictError, GraftError, KernelError, RefusedError
from graft.kernel.mounts import BPFFS, MOUNT, mount_bpffs
from graft.kernel.ownership import problem_of
from graft.model.settings import POLICY_FOLDER, Settings
from graft.saved.store import Store
from graft.splice import client as splice
from graft.splice import control
from graft.state import records

_ASK_SECONDS = 5.0
_PRIVATE = 0o700


@dataclass(frozen=True, slots=True)
class Ailment:
    """Something that is wrong. ``command`` is what an operator would type; ``mend`` does it, None where only the
    operator can.
    """

    name: str
    problem: str
    command: str
    mend: Callable[[], object] | None = None


def ailments(settings: Settings) -> list[Ailment]:
    """What is wrong now, in the order in which it is to be mended."""
    return [*_bpffs(settings), *_folders(settings), *_data_plane(settings), *_processes(settings)]


def mend(settings: Settings, tell: Callable[[str], object]) -> list[Ailment]:
    """Mend what can be mended, one after the other; ``tell`` gets a line for each. Gives what is wrong afterwards."""
    tried: set[str] = set()
    while True:
        found = ailments(settings)
        one = next((one for one in found if one.mend is not None and one.name not in tried), None)
        if one is None or one.mend is None:
            return found
        tried.add(one.name)
        try:
            one.mend()
            tell(f"{one.name}: {one.problem}: mended")
        except (GraftError, OSError) as error:
            tell(f"{one.name}: {one.problem}: cannot be mended: {error}")


def _bpffs(settings: Settings) -> Iterator[Ailment]:
    if not settings.pin_dir.is_relative_to(BPFFS):
        return
    if not os.path.ismount(BPFFS):
        yield Ailment("bpffs", "it is not mounted", MOUNT, partial(mount_bpffs, settings.pin_dir))
    elif problem := problem_of(BPFFS.lstat()):
        yield Ailment("bpffs", problem, f"chmod 700 {BPFFS}", partial(mount_bpffs, settings.pin_dir))


def _folders(settings: Settings) -> Iterator[Ailment]:
    for folder, forbidden in ((settings.run_dir, 0o077), (settings.state_dir, 0o022)):
        try:
            found = folder.stat()
        except FileNotFoundError:
            continue
        if found.st_uid != 0 or found.st_mode & forbidden:
            command = f"chown root {folder}; chmod 700 {folder}"
            name = f"folder {folder}"
            problem = f"others than root may use it (owner {found.st_uid}, mode {found.st_mode & 0o7777:o})"
            if folder == settings.state_dir and any((folder / one).exists() for one in ("saved", POLICY_FOLDER)):
                # Others may have written what would be restored, or granted.
                yield Ailment(name, problem, f"look at what is there (graft export, {POLICY_FOLDER}), then: {command}")
            else:
                yield Ailment(name, problem, command, partial(_make_private, folder))


def _make_private(folder: Path) -> None:
    os.chown(folder, 0, -1)
    folder.chmod(_PRIVATE)


def _data_plane(settings: Settings) -> Iterator[Ailment]:
    try:
        if dataplane.is_up(settings):
            if problem := renew.problem(settings):
                yield Ailment("hooks", problem, "graft up", partial(_mend_hooks, settings))
        elif Store(settings).exists:
            yield Ailment(
                "data plane", "something is saved, and Graft is not up", "graft up", lambda: up.bring_up(settings)
            )
    except ConflictError as error:
        yield Ailment("data plane", error.message, "stop the containers, then: graft down; graft up")


def _mend_hooks(settings: Settings) -> None:
    dataplane.up(settings)
    renew.renew(settings)


def _processes(settings: Settings) -> Iterator[Ailment]:
    relayed = any(one.is_relayed for one in records.read_all(settings)[0])
    if relayed and not _graftd_answers(settings):
        name = "graftd"
        if splice.runs(settings):
            yield Ailment(name, "it does not answer", f"see {settings.run_dir}/graftd.log")
        else:
            yield Ailment(
                name,
                "containers need it, and it does not run",
                "graft daemon, or systemctl start graftd",
                lambda: splice.ensure_daemon(settings),
            )
    if _waits_for_containers(settings) and not watcher_process.is_running(settings):
        yield Ailment(
            "watcher",
            "nobody watches for saved containers that start",
            "graft up",
            lambda: watcher_process.ensure_running(settings),
        )


def _graftd_answers(settings: Settings) -> bool:
    try:
        return control.ask(settings, {"do": "ping"}, _ASK_SECONDS) is not None
    except GraftError:
        return False


def _waits_for_containers(settings: Settings) -> bool:
    store = Store(settings)
    try:
        return store.exists and bool(store.read()[0].attachments)
    except RefusedError:  # others may write there, which is told of the folder
        return False
    except KernelError:  # it cannot be listed now
        return True
