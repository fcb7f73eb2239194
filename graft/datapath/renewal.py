"""Puts the hooks of another version of Graft in the place of those in force, on the same maps: nothing is removed.

    compile, load on the pinned maps ── pins ── each cgroup, program by program ── note which they are

The maps, and so all rules, tags and counters, stay. Each program is replaced in one step, so that a call is always
judged; within a moment some by the old hooks, others by the new. Which text the hooks in force were compiled from is
noted in the map `settings`, when all are replaced: one who is killed before has the next one do it again.

Maps of another form are another layout (LAYOUT_VERSION), for which everything is made anew: `graft down`, `graft up`.
The relay in the kernel is not replaced, which decides nothing: graftd tests it, and has what `graft up` made.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from graft.datapath import loader
from graft.datapath.compiled import ANEW
from graft.datapath.maps import Maps
from graft.datapath.programs import RELAY_PROGRAM
from graft.datapath.sources import BpfSources
from graft.errors import ConflictError
from graft.kernel import bpf
from graft.model.settings import Settings

_FIRST = ctypes.c_uint32(0)


def is_current(settings: Settings) -> bool:
    """Whether the hooks in force were all compiled from this Graft's text. Raises NotUpError."""
    maps = Maps(settings.pin_dir)
    try:
        found = maps.settings.get(_FIRST)
    finally:
        maps.close()
    return found is not None and bytes(found.hooks) == loader.digest(BpfSources.read())


def note(settings: Settings, digest: bytes) -> None:
    """Note which hooks are in force. The caller has the installation's lock."""
    maps = Maps(settings.pin_dir)
    try:
        value = maps.settings.get(_FIRST)
        assert value is not None
        value.hooks[:] = digest
        maps.settings.put(_FIRST, value)
    finally:
        maps.close()


def pin_new(settings: Settings) -> bytes:
    """Load this Graft's hooks on the maps that are pinned, and pin them in the place of those that are. What is
    attached later is these. Gives what `note` notes of them. The caller has the installation's lock.

    Changes nothing if it fails: ConflictError where the maps or the programs are others by name or form, CompileError,
    ProgramsRefused, OSError.
    """
    with _pinned_maps(settings.pin_dir) as pinned:
        loaded = loader.load(settings.cache_dir, pinned)  # (a map that is not pinned is a cache, and begins anew)
        _refuse_others(settings.pin_dir, {f"prog_{name}" for name in loaded.programs})
        _exchange_pins(settings.pin_dir, {f"prog_{name}": fd for name, fd in loaded.programs.items()})
        return loader.digest(loaded.sources)


@contextlib.contextmanager
def _pinned_maps(folder: Path) -> Iterator[dict[str, int]]:
    """The descriptors of the maps, by name."""
    with contextlib.ExitStack() as opened:
        found = {}
        for name in loader.MAPS:
            try:
                found[name] = bpf.obj_get(folder / name)
            except FileNotFoundError:
                raise ConflictError(f"{folder} has no map {name}", ANEW) from None
            opened.callback(os.close, found[name])
        yield found


def _refuse_others(folder: Path, names: set[str]) -> None:
    """A program that is new would be attached nowhere, and one that is no more would go on."""
    others = names.symmetric_difference(one.name for one in folder.glob("prog_*"))
    others.discard(f"prog_{RELAY_PROGRAM.name}")
    if others:
        raise ConflictError(f"this version of Graft has other programs: {', '.join(sorted(others))}", ANEW)


def _exchange_pins(folder: Path, programs: dict[str, int]) -> None:
    """Each in one step. Whoever is killed in between leaves some of both, which go together: they share all maps."""
    for name, fd in programs.items():
        new = folder / f"new-{name}"
        new.unlink(missing_ok=True)
        bpf.obj_pin(fd, new)
        new.replace(folder / name)
