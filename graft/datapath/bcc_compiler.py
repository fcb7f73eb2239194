"""Compiles the BPF programs with bcc, gives their instructions, and loads each program on its own.

The only module that imports bcc. It runs once, in `graft up` and in `graft doctor`; every later command opens the pins.
bcc needs no kernel headers: BCC_KERNEL_SOURCE names our own tree, bpf/include.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graft.datapath.programs import Program
from graft.datapath.sources import bpf_source_dir
from graft.errors import KernelError
from graft.kernel import bpf


class CompileError(KernelError):
    """The sources do not compile here, or their maps cannot be made. ``log``: the compiler's output."""

    def __init__(self, message: str, hint: str | None = None, log: str = "") -> None:
        super().__init__(message, hint)
        self.log = log


class NotLoaded(Exception):
    """The kernel refuses a program. The text is the verifier's log."""


@contextlib.contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """The output of the compiler and the verifier, which are C++ and write to descriptor 2."""
    captured: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.memfd_create("graft-compiler"), "w+b", buffering=0) as file:
        os.dup2(file.fileno(), 2)
        try:
            yield captured
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            captured.append(file.read().decode(errors="replace"))


class Compiled:
    """The programs and maps of one compilation, valid as long as this object, which closes their descriptors."""

    def __init__(self, module: Any) -> None:
        self._module = module
        # bcc itself would keep them until the interpreter ends.
        atexit.unregister(module.cleanup)
        weakref.finalize(self, module.cleanup).atexit = False

    def instructions(self, program: Program) -> bytes:
        """The program as the compiler made it, before the verifier sees it."""
        from bcc import lib

        function = program.function.encode()
        start = lib.bpf_function_start(self._module.module, function)
        return ctypes.string_at(start, lib.bpf_function_size(self._module.module, function))

    def load(self, program: Program) -> int:
        """A descriptor, which is closed with this object. Raises NotLoaded."""
        attach_type = bpf.ATTACH_TYPES[program.attach]
        try:
            with _captured_stderr() as log:
                loaded = self._module.load_func(program.function.encode(), program.type, attach_type=attach_type)
        except Exception as error:
            raise NotLoaded("".join(log) or str(error)) from error
        return int(loaded.fd)

    def map_fd(self, name: str) -> int:
        """The descriptor of a map, which is closed with this object."""
        from bcc import lib

        return int(lib.bpf_table_fd(self._module.module, name.encode()))


def compile_text(sources: Sequence[str], constants: Mapping[str, int]) -> Compiled:
    """Compile ``sources``, files of the BPF source folder, as one text, and make their maps.

    ``constants`` are defined for the preprocessor. Raises CompileError.
    """
    folder = bpf_source_dir()
    os.environ["BCC_KERNEL_SOURCE"] = str(folder)
    try:
        from bcc import BPF
    except ImportError as error:
        raise CompileError("bcc is not installed for this Python", "apt-get install python3-bpfcc") from error
    flags = [*(f"-D{name}={value}" for name, value in constants.items()), f"-I{folder}", "-Wno-unused-value"]
    # One text: bcc rewrites map accesses only in the file that it compiles, not in what that includes.
    text = "\n".join(f'#line 1 "{name}"\n{(folder / name).read_text()}' for name in sources)
    try:
        with _captured_stderr() as log:
            return Compiled(BPF(text=text.encode(), cflags=flags))
    except Exception as error:
        output = "".join(log)
        raise CompileError(
            f"the BPF programs cannot be compiled: {_first_error(output) or error}", log=output
        ) from error


def _first_error(output: str) -> str:
    return next((line for line in output.splitlines() if "rror:" in line), "")
