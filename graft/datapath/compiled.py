"""The maps and programs of a compilation, in the kernel: maps are made at once, or are those of before; each program is
loaded on its own.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping

from graft.datapath.bytecode import Bytecode
from graft.datapath.programs import Program
from graft.errors import ConflictError, KernelError
from graft.kernel import bpf, bpf_load, bpf_maps
from graft.kernel.instructions import with_maps

ANEW = "stop its containers, then `graft down` and `graft up`"
"""What helps where a data plane cannot go on under another version of Graft."""


class NotLoaded(Exception):
    """The kernel refuses a program. The text is the verifier's log."""


class Compiled:
    """The programs and maps of one compilation, valid as long as this object, which closes their descriptors."""

    def __init__(self, bytecode: Bytecode, pinned: Mapping[str, int]) -> None:
        """Make the maps, but for those that are ``pinned``, by name, whose descriptors stay the caller's.

        Raises ConflictError for a pinned one of another form, KernelError for one that the kernel does not make.
        """
        self.bytecode = bytecode
        self._opened: list[int] = []
        weakref.finalize(self, _close_all, self._opened).atexit = False
        self._maps = {
            name: self._checked(name, pinned) if name in pinned else self._make(name) for name in bytecode.maps
        }

    def _checked(self, name: str, pinned: Mapping[str, int]) -> int:
        if bpf_maps.map_shape(pinned[name]) != self.bytecode.maps[name].shape:
            raise ConflictError(f"the map {name} has another form in this version of Graft", ANEW)
        return pinned[name]

    def _make(self, name: str) -> int:
        form = self.bytecode.maps[name]
        try:
            fd = bpf_maps.create(name, form.shape, form.types)
        except OSError as error:
            raise KernelError(f"the kernel does not make the map {name}: {error.strerror}") from error
        self._opened.append(fd)
        return fd

    def load(self, program: Program) -> int:
        """A descriptor, which is closed with this object. Raises NotLoaded."""
        code = with_maps(self.bytecode.programs[program.function], dict(enumerate(self._maps.values())))
        try:
            fd = bpf_load.load(program.type, bpf.ATTACH_TYPES[program.attach], program.function, code)
        except OSError as error:
            raise NotLoaded(error.strerror) from error
        self._opened.append(fd)
        return fd

    def map_fd(self, name: str) -> int:
        """The descriptor of a map, which is closed with this object if that has made it."""
        return self._maps[name]


def _close_all(opened: list[int]) -> None:
    for fd in opened:
        os.close(fd)
