"""The maps and programs of a compilation, in the kernel: maps are made at once, each program is loaded on its own."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping

from graft.datapath.bytecode import Bytecode
from graft.datapath.programs import Program
from graft.errors import KernelError
from graft.kernel import bpf, bpf_load, bpf_maps
from graft.kernel.instructions import with_maps


class NotLoaded(Exception):
    """The kernel refuses a program. The text is the verifier's log."""


class Compiled:
    """The programs and maps of one compilation, valid as long as this object, which closes their descriptors."""

    def __init__(self, bytecode: Bytecode) -> None:
        """Make the maps. Raises KernelError for one that the kernel does not make."""
        self._bytecode = bytecode
        self._opened: list[int] = []
        weakref.finalize(self, _close_all, self._opened).atexit = False
        self._maps = {name: self._make(name) for name in bytecode.maps}

    def _make(self, name: str) -> int:
        form = self._bytecode.maps[name]
        try:
            fd = bpf_maps.create(name, form.shape, form.types)
        except OSError as error:
            raise KernelError(f"the kernel does not make the map {name}: {error.strerror}") from error
        self._opened.append(fd)
        return fd

    def instructions(self, program: Program) -> bytes:
        """The program as the compiler made it, before the verifier sees it. It has maps by their places."""
        return self._bytecode.programs[program.function]

    def load(self, program: Program, instead: Mapping[str, int] | None = None) -> int:
        """A descriptor, which is closed with this object. ``instead``: maps to use in the place of its own, by name.

        Raises NotLoaded.
        """
        maps = {**self._maps, **(instead or {})}
        code = with_maps(self.instructions(program), dict(enumerate(maps[name] for name in self._maps)))
        try:
            fd = bpf_load.load(program.type, bpf.ATTACH_TYPES[program.attach], program.function, code)
        except OSError as error:
            raise NotLoaded(error.strerror) from error
        self._opened.append(fd)
        return fd

    def map_fd(self, name: str) -> int:
        """The descriptor of a map, which is closed with this object."""
        return self._maps[name]


def _close_all(opened: list[int]) -> None:
    for fd in opened:
        os.close(fd)
