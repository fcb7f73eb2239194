"""What an engine's configuration becomes when it gets the runtime `graft`, and when it loses it again. Pure.

Nothing else in a file changes, not even its layout. What was written by hand is not overwritten: an entry counts as
Graft's only if it is exactly what Graft writes, for a program of the name graft-runtime.

Sources: dockerd(8) for daemon.json, containers.conf(5) of podman, containerd-config.toml(5).
"""

from __future__ import annotations

import copy
import json
import os.path
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from graft.errors import ConflictError, NotFoundError, UsageError
from graft.model import json_text
from graft.oci.json_members import read_object, with_member, with_value, without_member

NAME = "graft"
"""Of the runtime: `--runtime graft`."""

PROGRAM = "graft-runtime"
MAX_BYTES = 1 << 20
_NEW_JSON = "{\n}\n"
_HEAD = "# Written by `graft runtime install`; `graft runtime uninstall` removes it."
_TABLE = "[engine.runtimes]"
_TABLE_LINE = re.compile(r"\s*\[\s*engine\s*\.\s*runtimes\s*\]\s*(#.*)?")
_ENTRY_LINE = re.compile(rf'{NAME} = \["(.*/)?{PROGRAM}"\]')
_CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
_SHIM = "io.containerd.runc.v2"


class ByHandError(NotFoundError):
    """The operator has to write into a file; ``text`` is what."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text

    def lines(self) -> list[str]:
        """The message, and the lines to write."""
        return [*super().lines(), *self.text.splitlines()]


def foreign(source: str, field: str) -> ConflictError:
    """The error for what somebody else wrote."""
    return ConflictError(f"{source}: {field} is there, and Graft did not write it", "remove it by hand, if it may go")


# ---- docker: JSON ------------------------------------------------------------------------------------


def docker_with(text: str | None, program: str, source: str) -> str:
    """daemon.json, ``text`` (None: there is none), with the runtime. Raises UsageError, ConflictError."""
    if text is None:
        text = _NEW_JSON
    _parse_json(text, source)
    top = read_object(text, 0)
    section = top.find("runtimes", source)
    if section is None:
        return with_member(text, top, "runtimes", {NAME: {"path": program}})
    runtimes = read_object(text, section.value_start)
    entry = runtimes.find(NAME, source)
    if entry is None:
        return with_member(text, runtimes, NAME, {"path": program})
    found = json.loads(text[entry.value_start : entry.end])
    if found == {"path": program}:
        return text
    if not _is_ours(found):
        raise foreign(source, f"runtimes.{NAME}")
    return with_value(text, entry, {"path": program})


def docker_without(text: str | None, source: str) -> str | None:
    """daemon.json without the runtime; None where nothing but what Graft wrote was in it. Raises as `docker_with`."""
    if text is None:
        return None
    value = _parse_json(text, source)
    top = read_object(text, 0)
    section = top.find("runtimes", source)
    if section is None:
        return text
    runtimes = read_object(text, section.value_start)
    entry = runtimes.find(NAME, source)
    if entry is None:
        return text
    if not _is_ours(json.loads(text[entry.value_start : entry.end])):
        raise foreign(source, f"runtimes.{NAME}")
    if value.get("default-runtime") == NAME:
        raise ConflictError(f"{source}: default-runtime is {NAME}: docker would not start", "another one there first")
    if len(runtimes.members) > 1:
        return without_member(text, runtimes, entry)
    rest = without_member(text, top, section)
    return None if rest == _NEW_JSON else rest


def _is_ours(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"path"}
        and isinstance(value["path"], str)
        and os.path.basename(value["path"]) == PROGRAM
    )


def _parse_json(text: str, source: str) -> dict[str, Any]:
    """The object in ``text``, with an object of runtimes if any. Raises UsageError with the file and the place."""
    if not text.strip():
        raise UsageError(f"{source}: the file is empty, which is not JSON", "{} in it, or remove it")
    value = json_text.parse(text, source, MAX_BYTES)
    if not isinstance(value, dict):
        raise UsageError(f"{source}: must be an object", "{ ... }")
    if not isinstance(value.get("runtimes", {}), dict):
        raise UsageError(f"{source}: runtimes: must be an object", "{ NAME: { path: ... } }")
    return value


# ---- podman: TOML ------------------------------------------------------------------------------------


def podman_with(text: str | None, program: str, source: str) -> str:
    """containers.conf or a file of containers.conf.d, with the runtime. Raises UsageError, ConflictError."""
    line = f"{NAME} = [{json.dumps(program, ensure_ascii=False)}]"
    if text is None:
        return f"{_HEAD}\n{_TABLE}\n{line}\n"
    before = _parse_toml(text, source)
    found = _podman_runtimes(before).get(NAME)
    if found == [program]:
        return text
    result = _with_line(text, line, source if found is not None else None)
    if not _says(result, _with_runtime(before, program)):
        raise UsageError(f"{source}: cannot add to engine.runtimes as it is written there", f"write into it: {line}")
    return result


def _with_line(text: str, line: str, source: str | None) -> str:
    """``text`` with ``line`` in its table of runtimes: in place of the one that it has, if ``source`` is given."""
    lines = text.splitlines(keepends=True)
    if source is not None:
        lines[_entry_at(lines, source)] = f"{line}\n"
        return "".join(lines)
    heads = [at for at, one in enumerate(lines) if _TABLE_LINE.fullmatch(one.rstrip("\r\n"))]
    if not heads:
        gap = "" if not text or text.endswith("\n") else "\n"
        return f"{text}{gap}{_HEAD}\n{_TABLE}\n{line}\n"
    if not lines[heads[0]].endswith("\n"):
        lines[heads[0]] += "\n"
    lines.insert(heads[0] + 1, f"{line}\n")
    return "".join(lines)


def _with_runtime(value: dict[str, Any], program: str) -> dict[str, Any] | None:
    """``value`` as it is to be; None where it has something else in the place of a table."""
    wanted = copy.deepcopy(value)
    table = wanted
    for key in ("engine", "runtimes"):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            return None
    table[NAME] = [program]
    return wanted


def podman_without(text: str | None, source: str) -> str | None:
    """The same without the runtime; None where nothing but what Graft wrote was in it."""
    if text is None:
        return None
    before = _parse_toml(text, source)
    runtimes = _podman_runtimes(before)
    if NAME not in runtimes:
        return text
    if before["engine"].get("runtime") == NAME:
        raise ConflictError(f"{source}: engine.runtime is {NAME}: podman would not start", "another one there first")
    lines = text.splitlines(keepends=True)
    first = end = _entry_at(lines, source)
    end += 1
    written = [one.rstrip("\r\n") for one in lines]
    alone = end == len(lines) or not written[end].strip() or written[end].lstrip().startswith("[")
    if alone and first >= 2 and written[first - 2 : first] == [_HEAD, _TABLE]:
        first -= 2
    result = "".join(lines[:first] + lines[end:])
    del runtimes[NAME]
    if not _says(result, before):
        raise foreign(source, f"engine.runtimes.{NAME}")
    return result or None


def _podman_runtimes(value: dict[str, Any]) -> dict[str, Any]:
    engine = value.get("engine", {})
    found = engine.get("runtimes", {}) if isinstance(engine, dict) else {}
    return found if isinstance(found, dict) else {}


def _entry_at(lines: list[str], source: str) -> int:
    """Which line is the entry. Raises ConflictError if none is as Graft writes it."""
    for at, one in enumerate(lines):
        if _ENTRY_LINE.fullmatch(one.rstrip("\r\n")):
            return at
    raise foreign(source, f"engine.runtimes.{NAME}")


def _says(text: str, wanted: dict[str, Any] | None) -> bool:
    """Whether ``text`` is ``wanted``, but for tables that are empty."""
    try:
        return wanted is not None and _pruned(tomllib.loads(text)) == _pruned(wanted)
    except tomllib.TOMLDecodeError:
        return False


def _pruned(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` without empty tables in engine, which mean the same as none."""
    engine = value.get("engine")
    if not isinstance(engine, dict):
        return value
    kept = {key: one for key, one in engine.items() if (key, one) != ("runtimes", {})}
    rest = {key: one for key, one in value.items() if key != "engine"}
    return {**rest, "engine": kept} if kept else rest


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    """The table in ``text``. Raises UsageError with the file and the place."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source}: not TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{source}: nested too deep") from None


# ---- containerd: a file that its configuration imports -----------------------------------------------


def containerd_drop_in(config: str | None, program: str, source: str) -> tuple[str, str]:
    """(Path, text) of the file for containerd, whose configuration, at the path ``source``, is ``config``.

    Raises UsageError for a configuration that is no TOML, and ByHandError where it imports nothing that such a file
    could be.
    """
    value = _parse_toml(config or "", source)
    version, cri = _containerd_version(value, source)
    path = next(_import_places(value.get("imports", []), source), None)
    if path is None:
        raise by_hand(config, program, source, "it imports no folder for a file of Graft's")
    return path, f"{_HEAD}\nversion = {version}\n\n{_entry(cri, program)}"


def by_hand(config: str | None, program: str, source: str, why: str) -> ByHandError:
    """What to write into the configuration itself, and ``why``."""
    value = _parse_toml(config or "", source)
    _, cri = _containerd_version(value, source)
    text = _entry(cri, program)
    if "runc" not in _runtimes_of(value, cri):
        note = "# containerd 1.x has runc by itself only as long as no other runtime is listed"
        text = f'{note}\n[plugins."{cri}".containerd.runtimes.runc]\n  runtime_type = "{_SHIM}"\n{text}'
    return ByHandError(f"{source}: {why}: write this into it, beside the other runtimes", text)


def _containerd_version(value: dict[str, Any], source: str) -> tuple[int, str]:
    """(Version of the configuration, the section that runtimes are in). Raises UsageError for another version."""
    version = value.get("version", max(_CRI) if not value else 1)
    if version not in _CRI:
        raise UsageError(f"{source}: version: {version} is not known to Graft", "version = 2, or 3")
    return version, _CRI[version]


def containerd_has(config: str | None, program: str, source: str) -> bool:
    """Whether the configuration itself has the runtime."""
    return without_containerd_runtime(config or "", source)[1] == program


def containerd_place(config: str | None, source: str) -> str | None:
    """Where that file is, or would be; None where the configuration imports nothing such."""
    return next(_import_places(_parse_toml(config or "", source).get("imports", []), source), None)


def is_containerd_drop_in(text: str) -> bool:
    """Whether ``text`` is a file that Graft wrote there."""
    return text.startswith(f"{_HEAD}\n")


def _entry(cri: str, program: str) -> str:
    table = f'plugins."{cri}".containerd.runtimes.{NAME}'
    return (
        f'[{table}]\n  runtime_type = "{_SHIM}"\n'
        f"  [{table}.options]\n    BinaryName = {json.dumps(program, ensure_ascii=False)}\n"
    )


def _import_places(imports: Any, source: str) -> Iterator[str]:
    """Paths named graft.toml that ``imports`` would read: of a pattern such as /etc/containerd/conf.d/*.toml."""
    for pattern in imports if isinstance(imports, list) else ():
        if not isinstance(pattern, str):
            continue
        path = PurePosixPath(source).parent / pattern  # an absolute one stays what it is
        if fnmatchcase(f"{NAME}.toml", path.name) and not set(str(path.parent)) & set("*?["):
            yield str(path.parent / f"{NAME}.toml")


def without_containerd_runtime(dump: str, source: str) -> tuple[dict[str, Any], str | None]:
    """What `containerd config dump` says, but for the runtime and the list of files; and the runtime's program."""
    value = _parse_toml(dump, source)
    value.pop("imports", None)
    program = None
    for cri in _CRI.values():
        if entry := _runtimes_of(value, cri).pop(NAME, None):
            program = json_text.mapping(entry.get("options"), cri).get("BinaryName")
    return value, program


def _runtimes_of(value: dict[str, Any], cri: str) -> dict[str, Any]:
    """The runtimes in a configuration, by name. Raises UsageError for one that is not made like that."""
    section = value
    for key in ("plugins", cri, "containerd", "runtimes"):
        section = json_text.mapping(section.get(key), key)
    return section
