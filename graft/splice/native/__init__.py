"""The compiled form of graftd's inner modules: made by mypyc out of the same sources, at installation, and optional.

They are put here, and not beside their sources, so that only graftd uses them, and only if they are of these sources:

    graft/splice/connection.py                         what everybody else imports
    graft/splice/native/connection.cpython-311-*.so    found first once `use` put this folder before that one
    graft/splice/native/graftd_DIGEST__mypyc.*.so      the code of all modules, whose name tells its sources

Compiled modules and plain ones do not mix: all are loaded from here, or none.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import graft.splice
from graft.splice.native.sources import MODULES, library

NOT_COMPILED = "GRAFT_NO_COMPILED"
"""In the environment, not empty: plain Python serves, compiled or not."""

_FOLDER = Path(__file__).parent


def why_not() -> str:
    """Why plain Python serves; empty where the compiled modules do."""
    if os.environ.get(NOT_COMPILED):
        return f"{NOT_COMPILED} is set"
    if not (_FOLDER / f"{MODULES[0]}{importlib.machinery.EXTENSION_SUFFIXES[0]}").exists():
        return "no compiler, or no python3-dev, when Graft was installed"
    return "" if _library() else "it was compiled from another version of Graft: install it again"


def _library() -> importlib.machinery.ModuleSpec | None:
    """Where the code of all modules is; None where there is none that was compiled from these sources."""
    return importlib.machinery.PathFinder.find_spec(library(_FOLDER.parent), [str(_FOLDER)])


def use() -> bool:
    """Have the modules imported from here that are imported from now on; whether that is so.

    It is not where `why_not` says why, or where one of them was imported before.
    """
    if why_not() or any(f"graft.splice.{name}" in sys.modules for name in MODULES):
        return False
    spec = _library()
    if spec is None or spec.loader is None:
        return False
    try:
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where the modules look for it
        spec.loader.exec_module(sys.modules[spec.name])
    except ImportError:
        sys.modules.pop(spec.name, None)
        return False
    graft.splice.__path__.insert(0, str(_FOLDER))
    return True
