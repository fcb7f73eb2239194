"""Finds the cgroup of a container by its name: of a docker or podman container, of a systemd unit, or a cgroup path.

Runs the engines' own commands, and checks their output against the kernel: the process that an engine names must be in
a cgroup whose name contains the container's id. A container's name is one argument of a command, never part of a shell
command line. An engine is asked for three fields only: all that it knows of a container includes what an image says of
itself, as much as that likes.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.errors import ConflictError, KernelError, NotFoundError, UsageError
from graft.kernel import cgroup
from graft.kernel.pidfd import MAX_PID
from graft.model.address import shown
from graft.state import members
from graft.state.left_children import LeftChildren

_TIMEOUT = 15.0
_EXIT_TIMEOUT = 1.0  # after it was killed
_SEARCH_TIMEOUT = 10.0
_PROBE_TIMEOUT = 5.0
_MAX_BYTES = 1 << 20
WITH_IDS = ("docker", "podman")
"""Engines whose containers have an id each, besides a name."""
CGROUP_WITH_ID = re.compile(r"(?:^|[^0-9a-f])([0-9a-f]{64})(?:[^0-9a-f]|$)", re.ASCII)
"""The name of a container's cgroup has its id, whatever the engine and its cgroup driver."""

_CONTAINER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
_UNIT_NAME = re.compile(r"[A-Za-z0-9_:.@\\][A-Za-z0-9_:.@\\-]*", re.ASCII)
_MIN_ID_DIGITS = 12
"""What `docker ps` and `podman ps` show of an id."""
_NO_CONTAINER = "graft.asks-for-no-container"  # the beginning of no id
_FIELDS = "{{.Id}} {{.Name}} {{.State.Pid}}"
_INSPECTED = re.compile(r"([0-9a-f]{64}) /?([A-Za-z0-9][A-Za-z0-9_.-]*) ([0-9]{1,10})\n", re.ASCII)
"""What docker and podman say for these: each allows these characters only in a name."""
_UNIT_KINDS = (".service", ".slice", ".scope", ".socket", ".mount")

Run = Callable[[Sequence[str]], "EngineAnswer"]

_left = LeftChildren()
"""Commands of engines, by their words."""


@dataclass(frozen=True, slots=True)
class FoundContainer:
    """A cgroup that can be attached. ``pid`` is its first process, 0 if it has none."""

    cgroup: Path
    engine: str
    name: str
    id: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """Exit status and output of an engine's command; ``status`` None: there is no such command."""

    status: int | None
    out: str = ""
    err: str = ""


class NoAnswerError(KernelError):
    """A command of an engine did not end in time."""


def run(command: Sequence[str], timeout: float = _TIMEOUT) -> EngineAnswer:
    """Run an engine's command. Raises NoAnswerError if it takes longer, KernelError if it writes too much.

    What the command does in /proc, whoever may list that can have it wait for, so that it cannot be killed: it is left
    behind then, and the same is not asked again before it has ended.
    """
    if _left.has_one(_key(command)):
        raise _no_answer(command, timeout)
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            close_fds=False,  # none of Graft's is inherited; to find others it would look into /proc
        )
    except (FileNotFoundError, PermissionError):
        return EngineAnswer(None)
    try:
        out, err = _output(command[0], process, time.monotonic() + timeout)
    except BaseException as error:
        _end(command, process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise _no_answer(command, timeout) from None
        raise
    return EngineAnswer(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def is_silent(engine: str) -> bool:
    """Whether docker or podman does not even answer a question that concerns no container of its."""
    try:
        run([engine, "container", "inspect", "--format", _FIELDS, _NO_CONTAINER], _PROBE_TIMEOUT)
    except NoAnswerError:
        return True
    except KernelError:
        pass
    return False


def _output(program: str, process: subprocess.Popen[bytes], deadline: float) -> list[bytes]:
    """What a command writes until it ends, to each of its pipes. Raises TimeoutExpired, KernelError."""
    texts = {pipe.fileno(): bytearray() for pipe in (process.stdout, process.stderr) if pipe is not None}
    poll = select.poll()
    for fd in texts:
        poll.register(fd, select.POLLIN)
    left = len(texts)
    while left:
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not ready or time.monotonic() >= deadline:
            raise subprocess.TimeoutExpired(process.args, 0)
        for fd, _ in ready:
            chunk = os.read(fd, 1 << 16)
            texts[fd] += chunk
            if len(texts[fd]) > _MAX_BYTES:
                raise KernelError(f"{program} writes more than {_MAX_BYTES} bytes")
            if not chunk:
                poll.unregister(fd)
                left -= 1
    process.wait(max(0.0, deadline - time.monotonic()))
    return [bytes(text) for text in texts.values()]


def _key(command: Sequence[str]) -> str:
    return "\0".join(command)


def _no_answer(command: Sequence[str], timeout: float) -> NoAnswerError:
    return NoAnswerError(f"{command[0]} did not answer within {timeout:.0f} s", "check its daemon")


def _end(command: Sequence[str], process: subprocess.Popen[bytes]) -> None:
    """Kill a command, and leave it behind if it does not end."""
    process.kill()
    try:
        process.wait(_EXIT_TIMEOUT)
    except subprocess.TimeoutExpired:
        _left.leave(_key(command), process.pid)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def resolve(text: str, run: Run = run) -> FoundContainer:
    """The container that ``text`` names.

    ``text``: a path (absolute, or below the v2 mount), a name or id of docker or podman, or a systemd unit;
    with ``cgroup:``, ``docker:``, ``podman:`` or ``unit:`` before it, only that kind. Raises NotFoundError with what
    was tried, ConflictError if several match, KernelError if an engine's answer contradicts the kernel.
    """
    kind, separator, name = text.partition(":")
    finders = _finders(run)
    if separator and kind in finders:
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
        raise ConflictError(
            f"cgroup: {shown(text)} is ambiguous: {several}", "write docker:, podman:, unit: or cgroup: before it"
        )
    if not found:
        raise NotFoundError(f"cgroup: {shown(text)} not found: {'; '.join(tried)}", "docker ps, podman ps")
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
        if real.is_relative_to(top) and real != top and _is_cgroup(real, top):
            return FoundContainer(real, "cgroup", str(real.relative_to(top)), pid=_first_process(real))
    raise NotFoundError(f"cgroup: no cgroup {shown(text)} below {top}", "give a folder of the v2 tree")


def _is_cgroup(path: Path, top: Path) -> bool:
    """Whether that is a folder of the tree at ``top``. (What is in it may be held: members.py.)"""
    with contextlib.suppress(OSError):
        found = path.stat()
        return stat.S_ISDIR(found.st_mode) and found.st_dev == top.stat().st_dev
    return False


def _first_process(path: Path) -> int:
    """A process of a cgroup; 0 where there is none, or its folder is held."""
    with contextlib.suppress(KernelError):
        return next(iter(members.processes(path)), 0)
    return 0


# ---- docker and podman ------------------------------------------------------------------------------


def parse_inspect(engine: str, text: str) -> tuple[str, str, int]:
    """(id, name, process id) from `docker|podman container inspect` for `_FIELDS`. Raises NotFoundError if it is not
    running.
    """
    found = _INSPECTED.fullmatch(text)
    if found is None:
        raise KernelError(f"{engine}: cannot read the output of `container inspect` ({shown(_last_line(text))})")
    container_id, name, pid = found[1], found[2], int(found[3])
    if pid > MAX_PID:
        raise KernelError(f"{engine}: {pid} is not the number of a process")
    if pid == 0:
        raise NotFoundError(f"{engine}: the container {shown(name)} is not running", f"{engine} start")
    return container_id, name, pid


def _from_engine(engine: str, name: str, run: Run) -> FoundContainer:
    """The container of that name or id. Where no container has the name, engines take it for the beginning of an id, so
    who meant a container `db` that is gone would get any whose id begins so: a shortened id counts only as long as
    `docker ps` shows it. ``name`` of the result is the container's own.
    """
    if not _CONTAINER_NAME.fullmatch(name):
        raise UsageError(f"{engine}: {shown(name)} is not a container name")
    answer = run([engine, "container", "inspect", "--format", _FIELDS, name])
    if answer.status is None:
        raise NotFoundError(f"{engine}: {engine} is not installed")
    if answer.status != 0:
        raise NotFoundError(f"{engine}: {engine} reports {shown(_last_line(answer.err))}")
    container_id, full_name, pid = parse_inspect(engine, answer.out)
    if full_name != name and not (len(name) >= _MIN_ID_DIGITS and container_id.startswith(name)):
        raise NotFoundError(f"{engine}: {engine} answers for the container {shown(full_name)}")
    return FoundContainer(_cgroup_of(engine, container_id, pid), engine, full_name, container_id, pid)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing")


def _cgroup_of(engine: str, container_id: str, pid: int) -> Path:
    """The cgroup of a container, from one of its processes: the part of the path up to the folder with the id."""
    try:
        path = members.answer_about(f"/proc/{pid}", lambda: cgroup.of_process(pid))  # the process can hold that folder
    except FileNotFoundError:
        raise NotFoundError(f"{engine}: its process {pid} is gone") from None
    found = cut_at_id(path, container_id)
    if found is None:
        raise KernelError(
            f"{engine}: its process {pid} is in the cgroup {path}, whose name does not contain the container's id",
            "give the path of the cgroup",
        )
    return found


def cut_at_id(path: Path, container_id: str) -> Path | None:
    """``path`` up to the folder whose name contains the id: a container may have cgroups of its own below it."""
    for above in (*reversed(path.parents), path):
        if re.search(rf"(^|[^0-9a-f]){container_id}([^0-9a-f]|$)", above.name):
            return above
    return None


# ---- systemd ----------------------------------------------------------------------------------------


def parse_show(text: str) -> tuple[str, int]:
    """(cgroup, main process) from `systemctl show -p ControlGroup -p MainPID`; empty and 0 if there is none."""
    fields = dict(line.split("=", 1) for line in text.split("\n") if "=" in line)
    pid = fields.get("MainPID", "0")
    return fields.get("ControlGroup", ""), int(pid) if re.fullmatch(r"[0-9]{1,10}", pid, re.ASCII) else 0


def _from_systemd(name: str, run: Run) -> FoundContainer:
    if not _UNIT_NAME.fullmatch(name):
        raise UsageError(f"unit: {shown(name)} is not a unit name")
    unit = name if name.endswith(_UNIT_KINDS) else f"{name}.service"
    answer = run(["systemctl", "show", "-p", "ControlGroup", "-p", "MainPID", "--", unit])
    if answer.status == 0:
        return _unit_at(unit, *parse_show(answer.out))
    return _unit_in_tree(unit)


def _unit_at(unit: str, path: str, pid: int) -> FoundContainer:
    if not path.startswith("/") or path == "/":
        raise NotFoundError(f"unit: {unit} is not running", f"systemctl start {unit}")
    top = cgroup.v2_mount()
    found = top if "\0" in path else (top / path.lstrip("/")).resolve()
    if found.name != unit or not found.is_relative_to(top) or not found.is_dir():
        raise KernelError(f"unit: systemd reports that {unit} is in {path}, which does not exist in the v2 tree")
    pids = members.of_each([found]).get(found, members.Members((), frozenset())).pids
    return FoundContainer(found, "systemd", unit, pid=pid if pid in pids else next(iter(pids), 0))


def _is_systemds(folder: Path, top: Path) -> bool:
    """Whether only slices of root's are above it: below a scope, a service or an engine's folder others make some."""
    above = folder.relative_to(top).parts[:-1]
    if not all(name.endswith(".slice") for name in above):
        return False
    with contextlib.suppress(FileNotFoundError):  # it is gone by now
        return {one.stat().st_uid for one in (folder, *folder.parents) if one.is_relative_to(top)} == {
            top.stat().st_uid
        }
    return False


def _unit_in_tree(unit: str) -> FoundContainer:
    """If systemd does not answer: a cgroup with the unit's name, where systemd has its units."""
    top = cgroup.v2_mount()

    def find() -> list[Path]:
        return [folder for folder in cgroup.tree(top) if folder.name == unit and _is_systemds(folder, top)]

    found = members.answer_about(str(top), find, _SEARCH_TIMEOUT)
    if not found:
        raise NotFoundError(f"unit: systemd does not answer, and no cgroup is named {unit}")
    if len(found) > 1:
        raise ConflictError(f"unit: {len(found)} cgroups are named {unit}", f"give one of {', '.join(map(str, found))}")
    return FoundContainer(found[0], "systemd", unit, pid=_first_process(found[0]))
