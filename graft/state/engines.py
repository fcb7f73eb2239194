"""Finds the container that an operator means: a cgroup, a container of docker or podman, a systemd unit.

Engines are asked by their own commands, and what they answer is checked against the kernel: the process
that an engine names has to be in a cgroup that carries the container's id. Names of containers are data:
one argument of a command, never a part of a shell's line.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.errors import ConflictError, KernelError, NotFoundError, UsageError
from graft.kernel import cgroup
from graft.kernel.pidfd import MAX_PID
from graft.model import json_text
from graft.model.address import shown

_TIMEOUT = 15.0
_MAX_BYTES = 16 << 20
_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
_UNIT = re.compile(r"[A-Za-z0-9_:.@\\][A-Za-z0-9_:.@\\-]*", re.ASCII)
_UNIT_KINDS = (".service", ".slice", ".scope", ".socket", ".mount")

Run = Callable[[Sequence[str]], "EngineAnswer"]


@dataclass(frozen=True, slots=True)
class FoundContainer:
    """A cgroup that can be attached. ``pid`` is its first process, 0 where it has none."""

    cgroup: Path
    engine: str
    name: str
    id: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """How a command of an engine ended; ``status`` None: there is no such command."""

    status: int | None
    out: str = ""
    err: str = ""


def run(command: Sequence[str]) -> EngineAnswer:
    """Run a command of an engine, with a limit of time. Raises KernelError where it is exceeded."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_TIMEOUT, env=environment, check=False
        )
    except (FileNotFoundError, PermissionError):
        return EngineAnswer(None)
    except subprocess.TimeoutExpired:
        raise KernelError(f"{command[0]} gave no answer within {_TIMEOUT:.0f} s", "is its daemon well?") from None
    return EngineAnswer(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def resolve(text: str, run: Run = run) -> FoundContainer:
    """The one container that ``text`` means.

    ``text``: a path (absolute, or below the v2 mount), a name or id of docker or podman, or a systemd unit;
    ``cgroup:``, ``docker:``, ``podman:`` and ``unit:`` before it choose. Raises NotFoundError with what was
    tried, ConflictError where several match, KernelError where an engine's answer cannot be true.
    """
    kind, chosen, name = text.partition(":")
    finders = _finders(run)
    if chosen and kind in finders:
        return finders[kind](name)
    if "/" in text:
        return _from_path(text)
    found: dict[Path, FoundContainer] = {}
    tried: list[str] = []
    for finder in finders.values():
        try:
            target = finder(text)
            found.setdefault(target.cgroup, target)
        except (NotFoundError, UsageError) as error:
            tried.append(error.message.partition(": ")[2] or error.message)
    if len(found) > 1:
        several = ", ".join(f"{target.engine}:{target.name}" for target in found.values())
        raise ConflictError(f"cgroup: {shown(text)} is more than one: {several}", "put docker:, podman:, unit: first")
    if not found:
        raise NotFoundError(f"cgroup: {shown(text)} is not to be found: {'; '.join(tried)}", "docker ps, podman ps")
    return next(iter(found.values()))


def _finders(run: Run) -> dict[str, Callable[[str], FoundContainer]]:
    return {
        "cgroup": _from_path,
        "docker": lambda name: _from_engine("docker", name, run),
        "podman": lambda name: _from_engine("podman", name, run),
        "unit": lambda name: _from_systemd(name, run),
    }


def _from_path(text: str) -> FoundContainer:
    top = cgroup.v2_mount()
    candidates = [top / text.lstrip("/")]
    if text.startswith("/"):
        candidates.insert(0, Path(text))
    for path in candidates:
        real = path.resolve()
        if real.is_relative_to(top) and real != top and (real / "cgroup.procs").exists():
            return FoundContainer(real, "cgroup", str(real.relative_to(top)), pid=_first_process(real))
    raise NotFoundError(f"cgroup: there is no cgroup {shown(text)} below {top}", "a folder of the v2 tree")


def _first_process(path: Path) -> int:
    return next(iter(cgroup.processes(path)), 0)


# ---- docker and podman ------------------------------------------------------------------------------


def parse_inspect(engine: str, text: str) -> tuple[str, str, int]:
    """(id, name, process id) of `docker|podman container inspect`. Raises NotFoundError where it does not run."""
    try:
        number, name, pid = _identity(json_text.parse(text, "its answer", _MAX_BYTES))
    except UsageError as error:
        raise KernelError(f"{engine}: cannot read what it says of the container ({error.message})") from None
    if not re.fullmatch(r"[0-9a-f]{64}", number):
        raise KernelError(f"{engine}: {shown(number)} is no id of a container")
    if pid <= 0:
        raise NotFoundError(f"{engine}: the container {shown(name)} is not running", f"{engine} start")
    return number, name, pid


def _identity(answer: Any) -> tuple[str, str, int]:
    found = json_text.mappings(answer, "its answer")
    if len(found) != 1:
        raise UsageError(f"its answer: {len(found)} containers")
    one = found[0]
    if missing := {"Id", "Name", "State"} - one.keys():
        raise UsageError(f"its answer: no {' and no '.join(sorted(missing))}")
    state = json_text.mapping(one["State"], "State")
    if "Pid" not in state:
        raise UsageError("its answer: no State.Pid")
    name = json_text.text(one["Name"], "Name").lstrip("/")
    return json_text.text(one["Id"], "Id"), name, json_text.number(state["Pid"], "State.Pid", MAX_PID)


def _from_engine(engine: str, name: str, run: Run) -> FoundContainer:
    if not _CONTAINER.fullmatch(name):
        raise UsageError(f"{engine}: {shown(name)} is not a container name")
    answer = run([engine, "container", "inspect", name])
    if answer.status is None:
        raise NotFoundError(f"{engine}: {engine} is not installed")
    if answer.status != 0:
        raise NotFoundError(f"{engine}: {engine} says {shown(_last_line(answer.err))}")
    number, called, pid = parse_inspect(engine, answer.out)
    return FoundContainer(_cgroup_of(engine, number, pid), engine, called, number, pid)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing")


def _cgroup_of(engine: str, number: str, pid: int) -> Path:
    """The cgroup of a container, by a process of it: the part of the process's cgroup that carries the id."""
    try:
        path = cgroup.of_process(pid)
    except FileNotFoundError:
        raise NotFoundError(f"{engine}: its process {pid} is gone") from None
    found = cut_at_id(path, number)
    if found is None:
        raise KernelError(
            f"{engine}: its process {pid} is in the cgroup {path}, which carries no id of the container",
            "name the cgroup itself",
        )
    return found


def cut_at_id(path: Path, number: str) -> Path | None:
    """``path`` up to the folder whose name has the id: a container may have cgroups of its own below it."""
    for above in (*reversed(path.parents), path):
        if re.search(rf"(^|[^0-9a-f]){number}([^0-9a-f]|$)", above.name):
            return above
    return None


# ---- systemd ----------------------------------------------------------------------------------------


def parse_show(text: str) -> tuple[str, int]:
    """(cgroup, main process) of `systemctl show -p ControlGroup -p MainPID`; empty and 0 where there is none."""
    fields = dict(line.split("=", 1) for line in text.split("\n") if "=" in line)
    pid = fields.get("MainPID", "0")
    return fields.get("ControlGroup", ""), int(pid) if re.fullmatch(r"[0-9]{1,10}", pid, re.ASCII) else 0


def _from_systemd(name: str, run: Run) -> FoundContainer:
    if not _UNIT.fullmatch(name):
        raise UsageError(f"unit: {shown(name)} is not a unit name")
    unit = name if name.endswith(_UNIT_KINDS) else f"{name}.service"
    answer = run(["systemctl", "show", "-p", "ControlGroup", "-p", "MainPID", "--", unit])
    if answer.status == 0:
        return _unit_in(unit, *parse_show(answer.out))
    return _unit_in_tree(unit)


def _unit_in(unit: str, path: str, pid: int) -> FoundContainer:
    if not path.startswith("/") or path == "/":
        raise NotFoundError(f"unit: {unit} is not running", f"systemctl start {unit}")
    top = cgroup.v2_mount()
    found = top if "\0" in path else (top / path.lstrip("/")).resolve()
    if found.name != unit or not found.is_relative_to(top) or not found.is_dir():
        raise KernelError(f"unit: systemd says that {unit} is in {path}, which is not there in the v2 tree")
    if pid and pid not in cgroup.processes(found):
        pid = 0
    return FoundContainer(found, "systemd", unit, pid=pid or _first_process(found))


def _unit_in_tree(unit: str) -> FoundContainer:
    """Where systemd cannot be asked: a folder of the unit's name."""
    found = [folder for folder in cgroup.tree(cgroup.v2_mount()) if folder.name == unit]
    if not found:
        raise NotFoundError(f"unit: systemd cannot be asked, and no cgroup is called {unit}")
    if len(found) > 1:
        raise ConflictError(f"unit: {len(found)} cgroups are called {unit}", f"one of {', '.join(map(str, found))}")
    return FoundContainer(found[0], "systemd", unit, pid=_first_process(found[0]))
