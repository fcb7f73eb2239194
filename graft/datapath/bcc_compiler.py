"""Compiles the BPF programs with bcc.

The only module that imports bcc. It runs in `graft up` and in `graft doctor`, where the cache (compile_cache.py) lacks
these programs; every later command opens the pins. bcc needs no kernel headers: BCC_KERNEL_SOURCE names our own tree,
bpf/include.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graft.datapath.bytecode import Bytecode, MapForm
from graft.datapath.sources import bpf_source_dir
from graft.errors import KernelError
from graft.kernel import bpf_maps
from graft.kernel.instructions import with_maps


class CompileError(KernelError):
    """The sources do not compile here, or their maps cannot be made. ``log``: the compiler's output."""

    def __init__(self, message: str, hint: str | None = None, log: str = "") -> None:
        super().__init__(message, hint)
        self.log = log


@contextlib.contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """The output of the compiler, which is C++ and writes to descriptor 2."""
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


def source_text(sources: Sequence[str]) -> str:
    """``sources``, files of the BPF source folder, as the one text that is compiled: bcc rewrites map accesses only in
    the file that it compiles, not in what that includes.
    """
    folder = bpf_source_dir()
    return "\n".join(f'#line 1 "{name}"\n{(folder / name).read_text()}' for name in sources)


def header_texts() -> list[str]:
    """What a source may include: graft.h and the header tree."""
    folder = bpf_source_dir()
    return [f'#line 1 "{path.relative_to(folder)}"\n{path.read_text()}' for path in sorted(folder.rglob("*.h"))]


def compile_text(sources: Sequence[str], constants: Mapping[str, int]) -> Bytecode:
    """Compile ``sources``, files of the BPF source folder.

    ``constants`` are defined for the preprocessor. Raises CompileError.
    """
    folder = bpf_source_dir()
    os.environ["BCC_KERNEL_SOURCE"] = str(folder)
    try:
        from bcc import BPF
    except ImportError as error:
        raise CompileError("bcc is not installed for this Python", "apt-get install python3-bpfcc") from error
    flags = [*(f"-D{name}={value}" for name, value in constants.items()), f"-I{folder}", "-Wno-unused-value"]
    try:
        with _captured_stderr() as log:
            module = BPF(text=source_text(sources).encode(), cflags=flags)
    except Exception as error:
        output = "".join(log)
        raise CompileError(
            f"the BPF programs cannot be compiled: {_first_error(output) or error}", log=output
        ) from error
    try:
        return _bytecode(module.module)
    finally:
        module.cleanup()  # with the maps that bcc has made


def _bytecode(module: int) -> Bytecode:
    from bcc import lib

    names = [_string(lib.bpf_table_name, module, place) for place in range(_count(lib.bpf_num_tables, module))]
    fds = [int(lib.bpf_table_fd(module, name.encode())) for name in names]
    maps = {name: MapForm(bpf_maps.map_shape(fd), bpf_maps.map_types(fd)) for name, fd in zip(names, fds, strict=True)}
    places = {fd: place for place, fd in enumerate(fds)}
    programs = {}
    for place in range(_count(lib.bpf_num_functions, module)):
        function = _string(lib.bpf_function_name, module, place)
        start = lib.bpf_function_start(module, function.encode())
        code = ctypes.string_at(start, lib.bpf_function_size(module, function.encode()))
        programs[function] = with_maps(code, places)
    return Bytecode(maps, programs)


def _count(asked: Any, module: int) -> int:
    asked.restype, asked.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    return int(asked(module))


def _string(asked: Any, module: int, place: int) -> str:
    asked.restype, asked.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_size_t]
    return str(asked(module, place).decode())


def _first_error(output: str) -> str:
    return next((line for line in output.splitlines() if "rror:" in line), "")
