"""Compiles the BPF programs with bcc.

The only module that imports bcc. It runs in `graft up` and in `graft doctor`, where the cache (compile_cache.py) lacks
these programs; every later command opens the pins. bcc needs no kernel headers: BCC_KERNEL_SOURCE names a copy of our
own tree, bpf/include.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graft.datapath.bytecode import Bytecode, MapForm
from graft.datapath.sources import BpfSources
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


def compile_text(sources: BpfSources, names: Sequence[str], constants: Mapping[str, int]) -> Bytecode:
    """Compile the files ``names`` of ``sources``.

    ``constants`` are defined for the preprocessor. Raises CompileError.
    """
    try:
        from bcc import BPF
    except ImportError as error:
        raise CompileError("bcc is not installed for this Python", "apt-get install python3-bpfcc") from error
    log: list[str] = []
    try:
        with sources.copied_headers() as folder, _captured_stderr() as log:
            os.environ["BCC_KERNEL_SOURCE"] = str(folder)
            flags = [*(f"-D{name}={value}" for name, value in constants.items()), f"-I{folder}", "-Wno-unused-value"]
            module = BPF(text=sources.text(names).encode(), cflags=flags)
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
