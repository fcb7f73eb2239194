"""A bundle's config.json: read, edited (pure), and written back in one step.

Only the file that the engine wrote is changed. A symbolic link in its place is refused, so that a container cannot
make this process, which is root's, write elsewhere.

Some of its values come from an image. A file that is invalid here is refused, and not left to the runtime, which
might accept it and start the container without the policy that it asks for.
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

from graft.errors import UsageError
from graft.kernel.atomic_file import write_atomically
from graft.model import json_text
from graft.model.json_text import mapping, mappings, text, text_by_name, texts
from graft.oci import seccomp_profile

Config = dict[str, Any]
HOOK, COMPILED_HOOK = "graft.oci.hook", "graft-hook"
_HOST_USER_NAMESPACE = "/proc/1/ns/user"
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Edit:
    """What to add to a configuration.

    ``create_runtime`` is the hook's command that attaches the container before its program starts, ``poststop`` the
    one that removes its rules. ``listener`` None leaves the seccomp profile unchanged; ``born``: it is notified of
    socket(2) alone; ``datagrams``: of socket(2) too. ``own_listeners`` is the prefix of the paths of Graft's own
    listeners.
    """

    create_runtime: tuple[str, ...]
    poststop: tuple[str, ...] | None = None
    environment: tuple[str, ...] = ()
    listener: str | None = None
    own_listeners: str | None = None
    metadata: str = ""
    wait_killable: bool = False
    born: bool = False
    datagrams: bool = False


def container_annotations(config: Mapping[str, Any]) -> dict[str, str]:
    """The container's annotations. Raises UsageError, as every function here does for a value of another type."""
    return text_by_name(config.get("annotations"), "annotations")


def edit_config(config: Mapping[str, Any], edit: Edit) -> Config:
    """A copy of ``config`` with the hooks and the notifications of ``edit``. A second edit changes nothing more.

    Raises ConflictError where the container's seccomp profile conflicts with them.
    """
    edited = copy.deepcopy(dict(config))
    hooks = mapping(edited.get("hooks"), "hooks")
    for kind in ("createRuntime", "poststop"):
        kept = [hook for hook in mappings(hooks.get(kind), f"hooks.{kind}") if not _is_ours(hook, kind)]
        command = edit.create_runtime if kind == "createRuntime" else edit.poststop
        if command is not None:
            kept.append({"path": command[0], "args": list(command), "env": list(edit.environment), "timeout": 60})
        if kept or kind in hooks:
            hooks[kind] = kept
    edited["hooks"] = hooks
    if edit.listener is not None:
        linux = edited["linux"] = mapping(edited.get("linux"), "linux")
        linux["seccomp"] = _edit_seccomp(seccomp_profile.check_profile(linux.get("seccomp"), "linux.seccomp"), edit)
    return edited


def divides_sockets(config: Mapping[str, Any]) -> bool:
    """Whether the container's seccomp profile can notify socket(2) for some families only. Raises UsageError."""
    linux = mapping(config.get("linux"), "linux")
    profile = seccomp_profile.check_profile(linux.get("seccomp"), "linux.seccomp")
    return seccomp_profile.divides_sockets(profile or seccomp_profile.allow_all_profile())


def _is_ours(hook: Mapping[str, Any], kind: str) -> bool:
    words = texts(hook.get("args"), f"hooks.{kind}.args")
    return HOOK in words or (bool(words) and os.path.basename(words[0]) == COMPILED_HOOK)


def _edit_seccomp(profile: Mapping[str, Any], edit: Edit) -> seccomp_profile.Profile:
    assert edit.listener is not None
    edited = seccomp_profile.with_notifications(
        profile or seccomp_profile.allow_all_profile(),
        edit.listener,
        edit.metadata,
        edit.own_listeners,
        edit.born,
        edit.datagrams,
    )
    if edit.wait_killable and seccomp_profile.WAIT_KILLABLE not in (edited.get("flags") or []):
        edited["flags"] = [*(edited.get("flags") or []), seccomp_profile.WAIT_KILLABLE]
    return edited


def namespace_path(config: Mapping[str, Any], kind: str) -> str | None:
    """The path of the namespace of ``kind`` that the container joins, "" for a new one, None for the runtime's."""
    linux = mapping(config.get("linux"), "linux")
    for namespace in mappings(linux.get("namespaces"), "linux.namespaces"):
        if text(namespace.get("type"), "linux.namespaces.type") == kind:
            return json_text.path(namespace.get("path"), "linux.namespaces.path")
    return None


def cgroups_path(config: Mapping[str, Any]) -> str:
    """The container's cgroup as its engine names it, "" where it does not."""
    return text(mapping(config.get("linux"), "linux").get("cgroupsPath"), "linux.cgroupsPath")


def has_own_user_namespace(config: Mapping[str, Any]) -> bool:
    """Whether the container's user namespace is not the host's."""
    joined = namespace_path(config, "user")
    if not joined:
        return joined == ""
    try:
        return os.stat(joined).st_ino != os.stat(_HOST_USER_NAMESPACE).st_ino
    except OSError:
        return False


def capability_sets(config: Mapping[str, Any], capability: str) -> list[str]:
    """The names of the capability sets of the container's first process with ``capability``, as CAP_NAME."""
    process = mapping(config.get("process"), "process")
    sets = mapping(process.get("capabilities"), "process.capabilities")
    names = {capability, capability.removeprefix("CAP_")}  # runtimes accept both, in lower case too
    members = {name: texts(listed, f"process.capabilities.{name}") for name, listed in sets.items()}
    return [name for name, listed in members.items() if names & {one.upper() for one in listed}]


def environment(config: Mapping[str, Any]) -> dict[str, str]:
    """The environment of the container's first process."""
    words = texts(mapping(config.get("process"), "process").get("env"), "process.env")
    return dict(word.split("=", 1) for word in words if "=" in word)


def read_config(path: str) -> Config | None:
    """The configuration at ``path``; None where there is no such file, which is left to the runtime to report.

    Raises UsageError for an invalid one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return None
    with open(fd, "rb") as file:
        return parse_config(file.read(_MAX_BYTES + 1), path)


def parse_config(raw: bytes, source: str) -> Config:
    """The configuration in ``raw``, which comes from ``source``. Raises UsageError for an invalid one.

    Bytes that are not UTF-8 are read as runtimes written in Go read them: as U+FFFD.
    """
    text = raw.decode(errors="replace")
    found = mapping(json_text.parse(text, source, _MAX_BYTES), source)
    if "\\u0000" in text:  # it is in few
        json_text.refuse_nul(found, source)
    return found


def write_config(path: str, config: Mapping[str, Any]) -> None:
    """Replace the file at ``path`` by ``config``, in one step, with the same mode and owner.

    Raises UsageError where that is not a regular file.
    """
    try:
        old = os.lstat(path)
        if not stat.S_ISREG(old.st_mode):
            raise UsageError(f"cannot write {path}: not a regular file")
        data = json.dumps(config).encode()
        write_atomically(Path(path), data, stat.S_IMODE(old.st_mode), (old.st_uid, old.st_gid))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
