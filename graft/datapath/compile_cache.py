"""Keeps what was compiled, so that the same programs are compiled once on a machine: the compiler takes seconds.

    /var/cache/graft/HASH      one compilation each; the hash is that of everything that decides what comes out

What is there is loaded into the kernel, so a file counts only if root alone can have written it. One that does not
count, or is damaged, is compiled anew; and a folder that cannot be written costs the time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from graft.datapath import bytecode
from graft.datapath.bcc_compiler import compile_text
from graft.datapath.bytecode import Bytecode
from graft.datapath.sources import BpfSources
from graft.kernel.atomic_file import write_atomically
from graft.kernel.ownership import NotOwnError, problem_of, read_own

_MOST = 16
"""Files that are kept: of some versions of Graft, for some kernels. Those that were used last stay."""
_OURS = re.compile(r"\.?[0-9a-f]{32}(\.\d+)?")  # with what a killed process had begun to write
_LIBRARY_FOLDER = Path("/usr/lib")
_LIBRARIES = ("libbcc.so.*", "libclang-cpp.so.*", "libLLVM*.so*")
_FORMAT = 2
"""Of a file, and of how Graft has bcc compile."""


def compile_cached(
    folder: Path | None, sources: BpfSources, names: Sequence[str], constants: Mapping[str, int]
) -> Bytecode:
    """`compile_text`, or what it gave before. ``folder``: of the cache, None for none. Raises CompileError."""
    if folder is None:
        return compile_text(sources, names, constants)
    path = folder / _name(sources, names, constants)
    found = _read(path)
    if found is not None:
        return found
    compiled = compile_text(sources, names, constants)
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if problem_of(folder.lstat()) is None:
            write_atomically(path, bytecode.encode(compiled))
            _remove_oldest(folder)
    return compiled


def _name(sources: BpfSources, names: Sequence[str], constants: Mapping[str, int]) -> str:
    """The hash of what decides: the text with its headers, the compiler, and the kernel, whose helpers bcc looks up."""
    machine = os.uname()
    kernel = (machine.machine, machine.release, machine.version, os.environ.get("ARCH"))
    decides = (_FORMAT, sources.text(names), sources.headers, sorted(constants.items()), _compiler(), kernel)
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:32]


def _compiler() -> object:
    """What tells bcc and its compiler from any other: their files, which are of packages of their own (Debian's)."""
    found = importlib.util.find_spec("bcc")
    if found is None or found.origin is None:
        return None
    libraries = (path for name in _LIBRARIES for path in _LIBRARY_FOLDER.glob(f"*/{name}"))
    files = [(path, path.stat()) for path in (Path(found.origin), *sorted(libraries))]
    return [(str(path), seen.st_size, seen.st_mtime_ns) for path, seen in files]


def _read(path: Path) -> Bytecode | None:
    try:
        if problem_of(path.parent.lstat()) is not None:
            return None
        compiled = bytecode.decode(read_own(path))
    except (OSError, NotOwnError, ValueError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path, follow_symlinks=False)
    return compiled


def _remove_oldest(folder: Path) -> None:
    ours = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
    aged = sorted(ours, key=lambda path: path.lstat().st_mtime_ns, reverse=True)
    for path in aged[_MOST:]:
        path.unlink(missing_ok=True)
