"""Which cgroups the programs are attached to, and for which container.

A socket belongs to the container of the cgroup that it was created in; the cgroup storage `scopes`, made by the
attachment, names that container. An attachment lasts as long as its cgroup.

Whose a program is, of those with one name on a cgroup, the kernel says by the maps that it uses: another version's
has those that are pinned (renewal.py), that of a data plane that is gone has others, which nobody finds any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path

from graft.datapath import layout
from graft.datapath.maps import Maps
from graft.datapath.programs import ALL_PROGRAMS, PROGRAMS, SPLICE_PROGRAMS, Program
from graft.errors import KernelError
from graft.kernel import bpf, cgroup
from graft.model.settings import Settings

_NAME_BYTES = 15  # BPF_OBJ_NAME_LEN without its NUL


@contextlib.contextmanager
def _opened(path: Path, number: int = 0) -> Iterator[int]:
    """A descriptor of the cgroup at ``path``. Raises FileNotFoundError, also if its id is not ``number`` (0: any)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if number not in (0, os.fstat(fd).st_ino):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield fd
    finally:
        os.close(fd)


def _pin(settings: Settings, program: Program) -> Path:
    return settings.pin_dir / f"prog_{program.name}"


def _loaded(settings: Settings, programs: Sequence[Program]) -> list[Program]:
    """Those that this kernel accepted: the others are not pinned."""
    return [program for program in programs if _pin(settings, program).exists()]


def _wanted(settings: Settings, splice: bool) -> list[Program]:
    """The programs for a cgroup. Raises KernelError where transport splice lacks one."""
    missing = [one.name for one in SPLICE_PROGRAMS if splice and not _pin(settings, one).exists()]
    if missing:
        raise KernelError(
            f"transport splice does not work here: the kernel refused {', '.join(missing)}",
            "graft doctor shows the reason",
        )
    return [*PROGRAMS, *(SPLICE_PROGRAMS if splice else ())]


@contextlib.contextmanager
def _opened_programs(settings: Settings, programs: Sequence[Program]) -> Iterator[list[tuple[int, int]]]:
    """(descriptor, number of the attach point) of each program."""
    fds: list[tuple[int, int]] = []
    try:
        for program in programs:
            fd = bpf.obj_get(_pin(settings, program))
            fds.append((fd, bpf.ATTACH_TYPES[program.attach]))
        yield fds
    finally:
        for fd, _ in fds:
            os.close(fd)


def attach(settings: Settings, path: Path, container: int, splice: bool = False, replaces: bool = False) -> None:
    """Attach the programs to the cgroup at ``path``, for ``container`` (0: Graft's own). Repeatable.

    ``splice``: those of that transport too. Each is put in the place of another version's, in one step, and
    (``replaces``) of what a data plane that is gone has left there. All of them or none: what was attached before a
    failure is detached again; but not what has replaced others, without which the cgroup would have none. Raises
    KernelError.
    """
    wanted = _wanted(settings, splice)
    maps = _maps_of_pinned(settings)
    if replaces:  # the scope is there with the first one, which decides nothing, before the others replace any
        wanted.sort(key=lambda program: program.name != "getsockname4")
    with _opened(path) as cgroup_fd, _opened_programs(settings, wanted) as programs:
        done: list[tuple[int, int]] = []
        try:
            for program, (fd, kind) in zip(wanted, programs, strict=True):
                if not _is_in(cgroup_fd, fd, kind) and not _replace_one(
                    cgroup_fd, fd, kind, program.function, maps, of_any_maps=replaces
                ):
                    bpf.prog_attach(cgroup_fd, fd, kind)
                    done.append((fd, kind))
                if replaces and fd == programs[0][0]:
                    set_scope(settings, path, container)
            if not replaces:
                set_scope(settings, path, container)
        except OSError as error:
            for fd, kind in done if not replaces else ():
                bpf.prog_detach(cgroup_fd, fd, kind)
            raise KernelError(f"cannot attach to the cgroup {path}: {error}") from error


def is_attached(settings: Settings, path: Path) -> bool:
    """Whether each program that a cgroup needs is attached to the one at ``path``, or another version's instead."""
    wanted = _loaded(settings, PROGRAMS)
    try:
        with _opened(path) as cgroup_fd, _opened_programs(settings, wanted) as programs:
            found = zip(wanted, programs, strict=True)
            others = [(program, kind) for program, (fd, kind) in found if not _is_in(cgroup_fd, fd, kind)]
            maps = _maps_of_pinned(settings) if others else frozenset()
            return bool(wanted) and all(any(_on_maps(cgroup_fd, kind, one.function, maps)) for one, kind in others)
    except FileNotFoundError:
        return False


def renew(settings: Settings, path: Path, number: int = 0) -> None:
    """Put the programs that are pinned in the place of another version's on the cgroup at ``path``, each in one step,
    if the cgroup's id is ``number`` (0: any). Those of a data plane that is gone stay. Repeatable, and safe for a
    cgroup that was removed. Raises OSError.
    """
    every, maps = _loaded(settings, ALL_PROGRAMS), _maps_of_pinned(settings)
    with (
        contextlib.suppress(FileNotFoundError),
        _opened(path, number) as cgroup_fd,
        _opened_programs(settings, every) as fds,
    ):
        for program, (fd, kind) in zip(every, fds, strict=True):
            if not _is_in(cgroup_fd, fd, kind):
                _replace_one(cgroup_fd, fd, kind, program.function, maps)


def _is_in(cgroup_fd: int, fd: int, kind: int) -> bool:
    """Whether a program is attached to a cgroup."""
    return bpf.prog_id(fd) in bpf.prog_ids(cgroup_fd, kind)


def _replace_one(
    cgroup_fd: int, fd: int, kind: int, name: str, maps: frozenset[int], of_any_maps: bool = False
) -> bool:
    """Attach a program in the place of one with that name, on these maps if there is one; false where there is none."""
    others = _named(cgroup_fd, kind, name) if of_any_maps else ()
    for number in chain(_on_maps(cgroup_fd, kind, name, maps), others):
        old = bpf.prog_by_id(number)
        try:
            bpf.prog_replace(cgroup_fd, fd, old, kind)
        finally:
            os.close(old)
        return True
    return False


def _named(cgroup_fd: int, kind: int, name: str) -> Iterator[int]:
    """The ids of the programs with that name that are attached to a cgroup."""
    return (number for number in bpf.prog_ids(cgroup_fd, kind) if bpf.prog_name(number) == name[:_NAME_BYTES])


def _on_maps(cgroup_fd: int, kind: int, name: str, maps: frozenset[int]) -> Iterator[int]:
    """Those of them that use one of these maps, or none at all: such a program says the same to everybody."""
    for number in _named(cgroup_fd, kind, name):
        used = bpf.prog_maps(number)
        if not used or not used.isdisjoint(maps):
            yield number


def _maps_of_pinned(settings: Settings) -> frozenset[int]:
    """The ids of the maps that the pinned programs use: no two data planes have any in common."""
    with _opened_programs(settings, _loaded(settings, ALL_PROGRAMS)) as programs:
        return frozenset().union(*(bpf.prog_maps(bpf.prog_id(fd)) for fd, _ in programs))


def _detach_by_id(cgroup_fd: int, number: int, kind: int) -> None:
    old = bpf.prog_by_id(number)
    try:
        bpf.prog_detach(cgroup_fd, old, kind)
    finally:
        os.close(old)


def detach_predecessors(path: Path, number: int = 0) -> None:
    """Detach from the cgroup at ``path``, if its id is ``number`` (0: any), what a data plane that is gone has left
    there. Safe to repeat.
    """
    with contextlib.suppress(FileNotFoundError), _opened(path, number) as cgroup_fd:
        for kind in bpf.CGROUP_ATTACH_TYPES:
            for program in bpf.prog_ids(cgroup_fd, kind):
                if bpf.prog_name(program).startswith("graft_"):
                    _detach_by_id(cgroup_fd, program, kind)


def has_programs(path: Path, effective: bool = False) -> bool:
    """Whether Graft's programs, of any installation, are attached to a cgroup or (``effective``) run for it."""
    with contextlib.suppress(FileNotFoundError), _opened(path) as cgroup_fd:
        return any(
            bpf.prog_name(number) == "graft_bind4"
            for number in bpf.prog_ids(cgroup_fd, bpf.ATTACH_TYPES["bind4"], effective)
        )
    return False


def lacks_programs(settings: Settings, path: Path, number: int, splice: bool) -> bool:
    """Whether the kernel has not all of a container's programs attached to the cgroup at ``path``, of this installation
    or of one that is gone. Not if the cgroup's id is not ``number`` (0: any), or it was removed.
    """
    wanted = [*PROGRAMS, *(SPLICE_PROGRAMS if splice else ())]
    with contextlib.suppress(FileNotFoundError), _opened(path, number) as cgroup_fd:
        return not all(_is_attached(cgroup_fd, program) for program in _loaded(settings, wanted))
    return False


def _is_attached(cgroup_fd: int, program: Program) -> bool:
    return any(_named(cgroup_fd, bpf.ATTACH_TYPES[program.attach], program.function))


# Where programs are attached to a cgroup and to one above it, the kernel would run them twice for one call, and the
# second run would judge the address that the first wrote.


def find_above(path: Path) -> Path | None:
    """The cgroup at ``path`` or above that Graft's programs are attached to already, if any."""
    if not has_programs(path, effective=True):
        return None
    top = cgroup.v2_mount()
    above = (path, *(parent for parent in path.parents if parent.is_relative_to(top)))
    return next((one for one in above if has_programs(one)), path)


def find_below(path: Path, besides: Collection[Path] = ()) -> Path | None:
    """A cgroup below ``path``, ``besides`` these, that Graft's programs are attached to already, if any. May never
    return: it lists folders that a process can hold.
    """
    passed = {path, *besides}
    return next((one for one in cgroup.tree(path) if one not in passed and has_programs(one)), None)


def set_scope(settings: Settings, path: Path, container: int) -> None:
    """Set which container the sockets of an attached cgroup belong to."""
    scopes = Maps(settings.pin_dir).scopes
    scopes.put(ctypes.c_uint64(cgroup.cgroup_id(path)), layout.Scope(container=container))
    scopes.close()


def detach(settings: Settings, path: Path, number: int = 0) -> None:
    """Detach the programs from the cgroup at ``path``, if its id is ``number`` (0: any). Safe to repeat, and for a
    cgroup that was removed.
    """
    every = _loaded(settings, ALL_PROGRAMS)
    with (
        contextlib.suppress(FileNotFoundError),
        _opened(path, number) as cgroup_fd,
        _opened_programs(settings, every) as fds,
    ):
        for program, (fd, kind) in zip(every, fds, strict=True):
            try:
                bpf.prog_detach(cgroup_fd, fd, kind)
            except OSError:  # it is not attached, but that of another version may be (renewal.py)
                with contextlib.suppress(OSError):
                    for other in _named(cgroup_fd, kind, program.function):
                        _detach_by_id(cgroup_fd, other, kind)


def scope_ids(settings: Settings) -> set[int]:
    """The ids of the cgroups that the programs are attached to, or were."""
    return {int(key.value) for key in Maps(settings.pin_dir).scopes.keys()}  # noqa: SIM118


def attached_cgroups(settings: Settings) -> list[Path]:
    """Every cgroup that the programs are attached to, Graft's own among them.

    May never return: it lists folders that a process can hold.
    """
    ids = scope_ids(settings)
    found = []
    for folder in cgroup.tree(cgroup.v2_mount()):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if cgroup.cgroup_id(folder) in ids:
                found.append(folder)
    return found


def detach_all(settings: Settings, kept: Path) -> None:
    """Detach the programs from every cgroup but ``kept`` and those below. May never return, as `attached_cgroups`."""
    for path in attached_cgroups(settings):
        if not path.is_relative_to(kept):
            detach(settings, path)
