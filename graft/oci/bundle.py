"""A bundle's config.json: read, edited (pure), and written back in one step.

Only the file that the engine wrote is touched. A link in its place is refused: what a container can write
never tells the runtime where to write.

The engine puts an image's words into it. What cannot be read here, or is not what it has to be, is refused and not left
to the runtime: that one may read it, and would start a container without the policy that was asked for.
"""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.errors import ConflictError, UsageError
from graft.kernel.files import write_atomically
from graft.model import json_text
from graft.model.json_text import mapping, mappings, text, text_by_name, texts
from graft.oci import seccomp_profile

Config = dict[str, Any]
HOOK = "graft.oci.hook"
_HOSTS_USERS = "/proc/1/ns/user"
_MAX_BYTES = 16 << 20
# With these crun takes its filter, or the filter's listener, from elsewhere.
_CRUNS_OWN = ("run.oci.seccomp.receiver", "run.oci.seccomp_bpf_data")


@dataclass(frozen=True, slots=True)
class Edit:
    """What is to be put into a configuration.

    ``hook`` is the command that has the container attached before its program starts, ``after`` the one
    for when it is gone; ``listener`` None leaves the seccomp profile as it is. ``listeners`` is how the
    path of any listener of Graft's begins.
    """

    hook: tuple[str, ...]
    after: tuple[str, ...] | None = None
    environment: tuple[str, ...] = ()
    listener: str | None = None
    listeners: str | None = None
    metadata: str = ""
    wait_killable: bool = False


def notes(config: Mapping[str, Any]) -> dict[str, str]:
    """The container's annotations. Raises UsageError, as everything here does for a part that is no such thing."""
    return text_by_name(config.get("annotations"), "annotations")


def edit_config(config: Mapping[str, Any], edit: Edit) -> Config:
    """A copy of ``config`` with the hooks, and the notifications, of ``edit``. Editing twice is editing once.

    Raises ConflictError where the container's seccomp profile leaves no room for them.
    """
    edited = copy.deepcopy(dict(config))
    hooks = mapping(edited.get("hooks"), "hooks")
    for kind in ("createRuntime", "poststop"):
        kept = [hook for hook in mappings(hooks.get(kind), f"hooks.{kind}") if not _is_ours(hook, kind)]
        command = edit.hook if kind == "createRuntime" else edit.after
        if command is not None:
            kept.append({"path": command[0], "args": list(command), "env": list(edit.environment), "timeout": 60})
        if kept or kind in hooks:
            hooks[kind] = kept
    edited["hooks"] = hooks
    if edit.listener is not None:
        linux = edited["linux"] = mapping(edited.get("linux"), "linux")
        linux["seccomp"] = _edit_seccomp(
            config, seccomp_profile.check_profile(linux.get("seccomp"), "linux.seccomp"), edit
        )
    return edited


def _is_ours(hook: Mapping[str, Any], kind: str) -> bool:
    return HOOK in texts(hook.get("args"), f"hooks.{kind}.args")


def _edit_seccomp(config: Mapping[str, Any], profile: Mapping[str, Any], edit: Edit) -> seccomp_profile.Profile:
    for name in _CRUNS_OWN:
        if notes(config).get(name):
            raise ConflictError(f"annotation {name}: it takes the container's seccomp filter from elsewhere")
    assert edit.listener is not None
    edited = seccomp_profile.with_notifications(
        profile or seccomp_profile.open_profile(), edit.listener, edit.metadata, edit.listeners
    )
    if edit.wait_killable and seccomp_profile.WAIT_KILLABLE not in (edited.get("flags") or []):
        edited["flags"] = [*(edited.get("flags") or []), seccomp_profile.WAIT_KILLABLE]
    return edited


def namespace_path(config: Mapping[str, Any], kind: str) -> str | None:
    """Path of the namespace of ``kind`` that the container joins, "" for a new one, None for the runtime's own."""
    linux = mapping(config.get("linux"), "linux")
    for namespace in mappings(linux.get("namespaces"), "linux.namespaces"):
        if text(namespace.get("type"), "linux.namespaces.type") == kind:
            return json_text.path(namespace.get("path"), "linux.namespaces.path")
    return None


def has_own_users(config: Mapping[str, Any]) -> bool:
    """Whether the container's user namespace is another than the host's."""
    joined = namespace_path(config, "user")
    if not joined:
        return joined == ""
    try:
        return os.stat(joined).st_ino != os.stat(_HOSTS_USERS).st_ino
    except OSError:
        return False


def capability_sets(config: Mapping[str, Any], capability: str) -> list[str]:
    """The names of the capability sets of the container's first process that hold ``capability``, as CAP_NAME."""
    process = mapping(config.get("process"), "process")
    sets = mapping(process.get("capabilities"), "process.capabilities")
    names = {capability, capability.removeprefix("CAP_")}  # runtimes take both, and do not mind small letters
    held = {name: texts(found, f"process.capabilities.{name}") for name, found in sets.items()}
    return [name for name, found in held.items() if names & {one.upper() for one in found}]


def environment(config: Mapping[str, Any]) -> dict[str, str]:
    """The environment of the container's first process."""
    words = texts(mapping(config.get("process"), "process").get("env"), "process.env")
    return dict(word.split("=", 1) for word in words if "=" in word)


def read_config(path: str) -> Config | None:
    """The configuration at ``path``; None where there is no file: the runtime says that better itself.

    Raises UsageError for one that is no configuration.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return None
    with open(fd, "rb") as file:
        return parse_config(file.read(_MAX_BYTES + 1), path)


def parse_config(raw: bytes, source: str) -> Config:
    """The configuration in ``raw``. Raises UsageError that names ``source`` for what is none.

    Bytes that are not UTF-8 are read as runtimes written in Go read them: as U+FFFD.
    """
    return mapping(json_text.parse(raw.decode(errors="replace"), source, _MAX_BYTES), source)


def write_config(path: str, config: Mapping[str, Any]) -> None:
    """Put ``config`` in the place of the file at ``path``, in one step, with its mode and owner.

    Raises UsageError where that is no plain file.
    """
    try:
        old = os.lstat(path)
        if not stat.S_ISREG(old.st_mode):
            raise UsageError(f"{path}: it is no plain file, so it is not written to")
        data = json.dumps(config).encode()
        write_atomically(Path(path), data, stat.S_IMODE(old.st_mode), (old.st_uid, old.st_gid))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
