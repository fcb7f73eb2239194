"""`graft up` and `graft down`: the data plane made aside and switched in, or taken away, under one lock.

Half a data plane is never seen: maps and programs are pinned in a folder of their own, which is renamed
into place when all of it is there. What was made before a failure goes with that folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from graft import attachments, layout
from graft.errors import ConflictError, KernelError, PrivilegeError
from graft.kernel import cgroup, netns
from graft.kernel.bpf import Map
from graft.maps import Maps
from graft.settings import Settings

if TYPE_CHECKING:
    from graft.loader import Loaded

_BPFFS = Path("/sys/fs/bpf")
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8


def require_root() -> None:
    """Raises PrivilegeError, at once, for anybody but root."""
    if os.geteuid() != 0:
        raise PrivilegeError("this needs root", "run it with sudo")


@contextlib.contextmanager
def locked(settings: Settings) -> Iterator[None]:
    """Alone among Graft's commands of this installation, until the block ends or the process dies."""
    with _lock_file(settings.run_dir):
        yield


def _lock_file(folder: Path) -> TextIO:
    """The lock, held. `graft down` removes it: who waited for that one then starts over with the next."""
    path = folder / "lock"
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            lock = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # noqa: SIM115
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            lock.close()
            raise
        lock.close()


def supervisors_cgroup(settings: Settings) -> Path:
    """The cgroup that supervisors run in, so that the sockets they make are born under the hooks."""
    return cgroup.v2_mount() / settings.cgroup / "supervisors"


def keepers_cgroup(settings: Settings) -> Path:
    """The cgroup of those that start supervisors and hold what these need: a leaf, so that the supervisors' own cgroups
    beside it can have limits.
    """
    return supervisors_cgroup(settings) / "keepers"


def is_up(settings: Settings) -> bool:
    """Whether the data plane is pinned. Raises ConflictError for one of another version."""
    maps = Maps(settings.pin_dir)
    if not (settings.pin_dir / "settings").exists():
        return False
    found = maps.settings.get(ctypes.c_uint32(0))
    maps.settings.close()
    if found is None or found.version != layout.LAYOUT_VERSION:
        raise ConflictError(
            f"{settings.pin_dir} was made by another version of Graft", "end its containers, then `graft down`"
        )
    return True


def up(settings: Settings) -> Maps:
    """Make sure that the data plane is there, and give its maps. Repeatable, and quick when it is.

    Raises PrivilegeError, KernelError, ConflictError.
    """
    require_root()
    if not is_up(settings) or not supervisors_cgroup(settings).exists():
        with locked(settings):
            if not is_up(settings):
                _make(settings)
            _supervise(settings)
    return Maps(settings.pin_dir)


def _mount_bpffs(pin_dir: Path) -> None:
    if not pin_dir.is_relative_to(_BPFFS) or os.path.ismount(_BPFFS):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(_BPFFS), b"bpf", ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC), b"mode=0700") != 0:
        raise KernelError(f"cannot mount bpffs: {os.strerror(ctypes.get_errno())}", f"mount -t bpf bpf {_BPFFS}")


def _make(settings: Settings) -> None:
    _mount_bpffs(settings.pin_dir)
    aside = settings.pin_dir.with_name(f"{settings.pin_dir.name}-new")
    _unpin(aside)
    try:
        aside.mkdir(mode=0o700, parents=True)
        loaded = _load(settings, aside)
        Map(loaded.map_fd("settings"), ctypes.c_uint32, layout.SettingsValue).put(
            ctypes.c_uint32(0), layout.SettingsValue(version=layout.LAYOUT_VERSION)
        )
        if settings.pin_dir.exists():
            settings.pin_dir.rmdir()
        aside.rename(settings.pin_dir)
    except OSError as error:
        _unpin(aside)
        raise KernelError(
            f"cannot pin to {settings.pin_dir}: {error.strerror}", "GRAFT_PIN_DIR must lie on a bpffs"
        ) from error
    except BaseException:
        _unpin(aside)
        raise


def _load(settings: Settings, folder: Path) -> Loaded:
    """Load the programs and pin them in ``folder``. Raises KernelError; what the verifier said is in a file then."""
    from graft import loader
    from graft.compiler import CompileError

    log = settings.run_dir / "verifier.log"
    try:
        loaded = loader.load()
    except (CompileError, loader.ProgramsRefused) as error:
        if not error.log:
            raise
        os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        log.write_text(error.log)
        raise KernelError(error.message, "; ".join(filter(None, [error.hint, f"see {log}"]))) from error
    loaded.pin(folder)
    with contextlib.suppress(KernelError):  # transport splice does without: splice(2) is its relay then
        loader.load_relay().pin(folder)
    return loaded


def _supervise(settings: Settings) -> None:
    """The supervisors' cgroup, under the hooks."""
    folder = supervisors_cgroup(settings)
    keepers_cgroup(settings).mkdir(parents=True, exist_ok=True)
    attachments.attach(settings, folder, 0)


def new_id(maps: Maps) -> int:
    """A number for an endpoint, a container or a ruleset, never given out before. Call it under `locked`."""
    first = ctypes.c_uint32(0)
    value = maps.settings.get(first)
    assert value is not None
    value.last_id += 1
    maps.settings.put(first, value)
    return int(value.last_id)


def down(settings: Settings, force: bool = False) -> None:
    """Remove every pin, attachment, cgroup and file of Graft's: the machine is as it was. Repeatable.

    Raises ConflictError while containers run, unless ``force``. Then the programs of containers whose
    sockets were swapped end too, whoever started them: what they have in the host's stack must not
    outlive the hooks that confine it. Other containers are detached, and run on.
    """
    require_root()
    own = cgroup.v2_mount() / settings.cgroup
    _stop_daemon(settings, force)
    with locked(settings):
        running = cgroup.processes(own)
        inhabited = _inhabited(settings)
        if (running or inhabited) and not force:
            raise ConflictError(
                f"{len(inhabited)} containers and {len(running)} processes are under Graft",
                "detach or end them; `graft down --force` does both",
            )
        for path, swapped in inhabited.items():
            if swapped:
                cgroup.kill(path)
        if running:
            cgroup.kill(own)
        if own.exists():
            cgroup.remove(own)
        attachments.detach_all(settings)
        _unpin(settings.pin_dir)
        for kept in (settings.run_dir / "netns").glob("*"):
            netns.release(kept)
        shutil.rmtree(settings.run_dir, ignore_errors=True)


def _inhabited(settings: Settings) -> dict[Path, bool]:
    """The attached cgroups that any process lives in, and whether sockets of theirs were swapped."""
    from graft import containers

    found, wrong = containers.records(settings)
    swap = layout.Transport.SWAP
    inhabited = {one.cgroup_path: one.transport == swap.name.lower() for one in found if containers.is_populated(one)}
    if wrong and (settings.pin_dir / "scopes").exists():
        inhabited = _unrecorded(settings) | inhabited
    return inhabited


def _unrecorded(settings: Settings) -> dict[Path, bool]:
    """The same by the maps alone, for where a record cannot be read. What no map knows counts as swapped."""
    maps = Maps(settings.pin_dir)
    inhabited = {}
    for path in attachments.attached_cgroups(settings):
        scope = maps.scopes.get(ctypes.c_uint64(cgroup.cgroup_id(path)))
        if scope is None or not scope.container or not cgroup.populated(path):
            continue  # Graft's own, or empty
        value = maps.containers.get(ctypes.c_uint32(scope.container))
        inhabited[path] = value is None or value.transport == layout.Transport.SWAP
    return inhabited


def _stop_daemon(settings: Settings, force: bool) -> None:
    """End the relays' daemon, unless containers are served and ``force`` does not say to end that."""
    from graft import daemon

    if force or not any((settings.run_dir / "containers").glob("*.json")):
        daemon.stop(settings)


def _unpin(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for pin in folder.iterdir():
            pin.unlink()
        folder.rmdir()
