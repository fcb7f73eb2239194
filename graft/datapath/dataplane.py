"""The data plane: made in a staging folder and renamed into place under one lock, which every change takes.

No command sees half a data plane: maps and programs are pinned in a folder of their own, which is renamed
into place when it is complete. After a failure that folder is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from graft.datapath import attachments, layout
from graft.datapath.maps import Maps
from graft.errors import ConflictError, KernelError
from graft.kernel import cgroup
from graft.kernel.bpf import Map
from graft.kernel.credentials import require_root
from graft.kernel.file_lock import is_at, open_locked
from graft.kernel.mounts import check_own, mount_bpffs
from graft.model.settings import Settings

if TYPE_CHECKING:
    from graft.datapath.loader import Loaded

_LOCK_SECONDS = 120.0
"""How long to wait for other commands. Each takes milliseconds, but many may wait, and `up` compiles."""


@contextlib.contextmanager
def locked(settings: Settings) -> Iterator[None]:
    """Hold the installation's lock, until the block ends or the process dies. Raises KernelError, which names who holds
    it, after two minutes.
    """
    fd = _lock_file(settings.run_dir)
    try:
        yield
    finally:
        os.close(fd)


def _lock_file(folder: Path) -> int:
    """The lock file, locked. `graft down` removes the file: a command that waited for it then tries the next one."""
    path, deadline = folder / "lock", time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fd = open_locked(path, deadline)
        except FileNotFoundError:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # only now: others may hold the folder above
            continue
        if is_at(fd, path):
            return fd
        os.close(fd)


def supervisors_cgroup(settings: Settings) -> Path:
    """The cgroup that supervisors run in, so that the hooks apply to the sockets that they make."""
    return cgroup.v2_mount() / settings.cgroup / "supervisors"


SUPERVISOR_CONTROLLERS = ("memory", "cpu")
"""The cgroup controllers that limit a supervisor (graft/swap/resource_limits.py)."""


def keepers_cgroup(settings: Settings) -> Path:
    """The cgroup of the keepers, which start supervisors.

    A leaf, so that the supervisors' own cgroups beside it can have limits.
    """
    return supervisors_cgroup(settings) / "keepers"


def own_cgroup(settings: Settings, container: int) -> Path:
    """The cgroup of a container's supervisors, and of its ferry: its replacement sockets are made there."""
    return supervisors_cgroup(settings) / f"container-{container}"


def forks_cgroup(settings: Settings) -> Path:
    """The cgroup of the fork server, and of its children before they enter their own (graft/kernel/fork_server.py)."""
    return cgroup.v2_mount() / settings.cgroup / "forks"


def relays_cgroup(settings: Settings) -> Path:
    """The cgroup of graftd, so that the hooks apply to the sockets that it makes for containers."""
    return cgroup.v2_mount() / settings.cgroup / "relays"


def is_up(settings: Settings) -> bool:
    """Whether the data plane is pinned. Raises ConflictError for another version's."""
    maps = Maps(settings.pin_dir)
    if not (settings.pin_dir / "settings").exists():
        return False
    found = maps.settings.get(ctypes.c_uint32(0))
    maps.settings.close()
    if found is None or found.version != layout.LAYOUT_VERSION:
        raise ConflictError(
            f"{settings.pin_dir} was made by another version of Graft", "stop its containers, then `graft down`"
        )
    return True


def up(settings: Settings) -> None:
    """Make the data plane, if it is not there, and attach its programs to the supervisors' cgroup, as far as the kernel
    says that they are not. Repeatable, and quick when all is there.

    Raises PrivilegeError, KernelError, ConflictError.
    """
    require_root()
    # Where that is, is looked up in the own folder in /proc: without the lock.
    supervisors = supervisors_cgroup(settings)
    if not is_up(settings) or not attachments.is_attached(settings, supervisors):
        with locked(settings):
            if not is_up(settings):
                _make(settings)
            _make_supervisors_cgroup(settings)


def check_supervised(settings: Settings) -> None:
    """Raises KernelError where programs are not attached to the supervisors' cgroup: what is made there would not be
    confined.
    """
    if not attachments.is_attached(settings, supervisors_cgroup(settings)):
        raise KernelError("not all hooks are attached to the cgroup of supervisors", "graft up")


def _make(settings: Settings) -> None:
    mount_bpffs(settings.pin_dir)
    staging = _aside(settings)
    try:
        staging.mkdir(mode=0o700, parents=True)
        loaded = _load(settings, staging)
        Map(loaded.map_fd("settings"), ctypes.c_uint32, layout.SettingsValue).put(
            ctypes.c_uint32(0), layout.SettingsValue(layout.LAYOUT_VERSION, _last_id(settings), _hooks(loaded))
        )
        if settings.pin_dir.exists():
            settings.pin_dir.rmdir()
        staging.rename(settings.pin_dir)
    except OSError as error:
        unpin(staging)
        raise KernelError(
            f"cannot pin to {settings.pin_dir}: {error.strerror}", "GRAFT_PIN_DIR must be on a bpffs"
        ) from error
    except BaseException:
        unpin(staging)
        raise


def _aside(settings: Settings) -> Path:
    """The folder beside the pins, in which they are made and removed, without what a killed command has left there."""
    folder = settings.pin_dir.with_name(f"{settings.pin_dir.name}-new")
    check_own(settings.pin_dir)
    check_own(folder)
    unpin(folder)
    return folder


def remove(settings: Settings) -> None:
    """Remove all pins: for whoever looks for them in one step, so that none finds some without the others. Safe to
    repeat.
    """
    folder = _aside(settings)
    with contextlib.suppress(FileNotFoundError):
        settings.pin_dir.rename(folder)
    unpin(folder)


def _hooks(loaded: Loaded) -> ctypes.Array[ctypes.c_uint8]:
    from graft.datapath import loader

    return (ctypes.c_uint8 * 16)(*loader.digest(loaded.sources))


def _last_id(settings: Settings) -> int:
    """The greatest id that a data plane before this one gave a container: its records are found by that (bpffs may
    have been unmounted while they ran), also where they are put aside, or of one that was just attached. Or that it
    gave an endpoint whose path, or namespace, is found by that: programs with the maps of before go on.
    """
    folders = (settings.run_dir / name for name in ("containers", "begun", "stale", "unix", "netns"))
    found = (path.name.removesuffix(".json") for folder in folders for path in folder.glob("*"))
    return max((int(number) for number in found if number.isdecimal()), default=0)


def _load(settings: Settings, folder: Path) -> Loaded:
    """Load the programs and pin them in ``folder``. Raises KernelError; the verifier's log is in a file then."""
    from graft.datapath import loader
    from graft.datapath.bcc_compiler import CompileError

    log = settings.run_dir / "verifier.log"
    try:
        loaded = loader.load(settings.cache_dir)
    except (CompileError, loader.ProgramsRefused) as error:
        if not error.log:
            raise
        os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        log.write_text(error.log)
        raise KernelError(error.message, "; ".join(filter(None, [error.hint, f"see {log}"]))) from error
    loaded.pin(folder)
    with contextlib.suppress(KernelError):  # transport splice works without it: it relays with splice(2) then
        loader.load_relay(settings.cache_dir).pin(folder)
    return loaded


def _make_supervisors_cgroup(settings: Settings) -> None:
    """Make the supervisors' cgroup, attach the programs to it, and enable what limits each supervisor in it. Where that
    fails, nobody has it: who would enter it fails too.
    """
    folder = supervisors_cgroup(settings)
    cgroup.make(keepers_cgroup(settings))
    cgroup.enable_controllers(folder, SUPERVISOR_CONTROLLERS)
    # In the place of those of a data plane that is gone, unless sockets of its containers are still made there.
    is_empty = not cgroup.populated(folder)
    try:
        attachments.attach(settings, folder, 0, replaces=is_empty)
    except KernelError:
        if is_empty:
            with contextlib.suppress(KernelError):
                cgroup.remove(folder, patience=0)
        raise


def unpin(folder: Path) -> None:
    """Remove a folder of pins. Safe to repeat. Raises OSError for what is no folder: where it leads is not followed."""
    with contextlib.suppress(FileNotFoundError):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in os.listdir(opened):
                os.unlink(name, dir_fd=opened)
        finally:
            os.close(opened)
        folder.rmdir()
