"""The operator's options for the wrapper: /etc/graft/runtime.yaml, or the environment of the engine.

They are read for every command of every container, so the file has only lines of ``key: value``: no YAML library is
loaded for it, and nothing else that takes long to import.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from graft.errors import NotFoundError, UsageError

FILE = "/etc/graft/runtime.yaml"
_RUNTIMES = ("crun", "runc")
_KEYS = ("runtime", "trust-annotations", "allow-net-admin")
_SWITCH = {"true": True, "false": False}


class RuntimeOptions(NamedTuple):
    """``runtime``: the real one, by name or path. ``trust_annotations`` None: it depends on the engine."""

    runtime: str | None = None
    trust_annotations: bool | None = None
    allow_net_admin: bool = False


def parse(text: str, source: str) -> RuntimeOptions:
    """The options in ``text``. Raises UsageError that names the line."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#", 1)[0].strip()
        if not line or line == "---":
            continue
        key, colon, value = line.partition(":")
        key, value = key.strip(), value.strip().strip("\"'")
        if not colon or key not in _KEYS:
            raise UsageError(f"{source}:{number}: unknown option: {line!r}", ", ".join(_KEYS))
        if key != "runtime" and value not in _SWITCH:
            raise UsageError(f"{source}:{number}: {key}: {value!r} is neither true nor false")
        found[key] = value
    trust = found.get("trust-annotations")
    return RuntimeOptions(
        runtime=found.get("runtime") or None,
        trust_annotations=None if trust is None else _SWITCH[trust],
        allow_net_admin=found.get("allow-net-admin") == "true",
    )


def load(environment: Mapping[str, str]) -> RuntimeOptions:
    """The options in the file (GRAFT_RUNTIME_CONFIG names another one), and GRAFT_RUNTIME. Raises UsageError."""
    path = environment.get("GRAFT_RUNTIME_CONFIG", FILE)
    try:
        with open(path) as file:
            options = parse(file.read(), path)
    except FileNotFoundError:
        options = RuntimeOptions()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    named = environment.get("GRAFT_RUNTIME")
    if not named:
        return options
    return RuntimeOptions(named, options.trust_annotations, options.allow_net_admin)


def _which(name: str) -> str | None:
    """Path of the program ``name``. (shutil.which takes longer to import than this whole module.)"""
    folders = [""] if "/" in name else os.environ.get("PATH", os.defpath).split(":")
    for path in (os.path.join(folder, name) for folder in folders):
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def find_runtime(options: RuntimeOptions) -> str:
    """Path of the real runtime. Raises NotFoundError, also where it is the wrapper itself."""
    for name in [options.runtime] if options.runtime else _RUNTIMES:
        path = _which(name)
        if path is None:
            continue
        if os.path.basename(os.path.realpath(path)) == "graft-runtime":
            raise NotFoundError(f"runtime: {name!r} is the wrapper itself", "runc or crun")
        return path
    wanted = options.runtime or " or ".join(_RUNTIMES)
    raise NotFoundError(f"runtime: {wanted} not found", "install runc or crun, or set GRAFT_RUNTIME")
