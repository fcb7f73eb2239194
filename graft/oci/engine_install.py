"""`graft runtime install` and `uninstall`: an engine's configuration is written, checked by the engine, or put back.

The file is replaced in one step, with the mode and owner that it had. Where it is a symbolic link, what it leads to is.
"""

from __future__ import annotations

import difflib
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from graft.errors import GraftError, NotFoundError, UsageError
from graft.kernel.atomic_file import write_atomically
from graft.model.address import shown
from graft.oci import engine_config
from graft.oci.engine_config import NAME, PROGRAM
from graft.state.engines import run

_CHECK_TIMEOUT = 60.0  # podman sets its storage up the first time
_DROP_INS = Path("/etc/containers/containers.conf.d")
DEFAULTS: Mapping[str, Path] = {
    "docker": Path("/etc/docker/daemon.json"),
    "podman": _DROP_INS / f"{NAME}.conf",
    "containerd": Path("/etc/containerd/config.toml"),
}
"""The file of each engine that is written; of containerd, the one that says where."""

_PODMAN = (
    "podman reads it at its next command; only an API service that runs has to be started again:"
    " systemctl try-restart podman.service"
)
_CONTAINERD = "containerd has to be started again (containers go on): systemctl restart containerd"
_AFTER_INSTALL: Mapping[str, str] = {
    "docker": "dockerd has to read it: systemctl reload docker, or send it SIGHUP (containers go on)",
    "podman": _PODMAN,
    "containerd": _CONTAINERD,
}
_AFTER_UNINSTALL: Mapping[str, str] = {
    # As of dockerd 20.10: a reload of a file without `runtimes` changes no runtime.
    "docker": "dockerd has to be started again: systemctl restart docker (where the file has other runtimes, a reload"
    " will do)",
    "podman": _PODMAN,
    "containerd": _CONTAINERD,
}


@dataclass(frozen=True, slots=True)
class Content:
    """What is in a file, None where there is none, with its mode and owner."""

    text: str | None
    mode: int = 0o644
    owner: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What a file has, and what it is to have (None: no file)."""

    path: Path
    before: Content
    after: str | None

    @property
    def is_needed(self) -> bool:
        """Whether that is another text."""
        return self.before.text != self.after

    def diff(self) -> list[str]:
        """The lines of `diff -u`."""
        old, new = (self.before.text or "").splitlines(), (self.after or "").splitlines()
        names = (
            str(self.path if self.before.text is not None else os.devnull),
            str(self.path if self.after is not None else os.devnull),
        )
        return list(difflib.unified_diff(old, new, *names, lineterm=""))


@dataclass(frozen=True, slots=True)
class Done:
    """What was changed; ``checked_by`` is the engine's command, or ``unchecked`` says why there was none."""

    change: Change
    checked_by: str = ""
    unchecked: str = ""
    reload: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """How an engine accepts a configuration: ``run`` raises GraftError if it does not. Without it, ``why_not``."""

    command: str = ""
    run: Callable[[], object] = lambda: None
    why_not: str = ""


def own_program() -> Path:
    """The graft-runtime that belongs to the command that runs. Raises NotFoundError."""
    import sys

    beside = Path(sys.argv[0]).absolute().with_name(PROGRAM)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(PROGRAM)
    if found is None:
        raise NotFoundError(f"{PROGRAM} not found", "--program PATH")
    return Path(found)


def check_program(path: Path) -> str:
    """``path`` as it is written. Raises UsageError, naming the option, for what no engine could run."""
    text = os.path.abspath(path)
    if path.name != PROGRAM or not text.isprintable() or "%" in text:
        raise UsageError(f"--program: {shown(text)} is not a path to {PROGRAM}", f"/usr/bin/{PROGRAM}")
    if not os.path.isfile(text) or not os.access(text, os.X_OK):
        raise UsageError(f"--program: {shown(text)} cannot be executed", f"/usr/bin/{PROGRAM}")
    return text


def install(engine: str, config: Path | None, program: Path, dry_run: bool = False) -> Done:
    """Give the engine the runtime. Raises GraftError: then its configuration is what it was."""
    where, words = _place(engine, config), check_program(program)
    if engine == "containerd":
        change = _containerd_change(where, words)
    else:
        edit = engine_config.docker_with if engine == "docker" else engine_config.podman_with
        before = read(where)
        change = Change(where, before, edit(before.text, words, str(where)))
    return _carry_out(engine, change, where, words, dry_run)


def uninstall(engine: str, config: Path | None, dry_run: bool = False) -> Done:
    """Take it away again. Raises GraftError: then the engine's configuration is what it was."""
    where = _place(engine, config)
    if engine == "containerd":
        path = engine_config.containerd_place(read(where).text, str(where))
        change = (
            Change(where, Content(None), None) if path is None else Change(Path(path), _own_drop_in(Path(path)), None)
        )
    else:
        edit = engine_config.docker_without if engine == "docker" else engine_config.podman_without
        before = read(where)
        change = Change(where, before, edit(before.text, str(where)))
    return _carry_out(engine, change, where, None, dry_run)


def _place(engine: str, config: Path | None) -> Path:
    """The file of ``engine``. Raises UsageError for an engine that Graft does not know."""
    if engine not in DEFAULTS:
        raise UsageError(f"ENGINE: {shown(engine)} is not an engine", ", ".join(DEFAULTS))
    path = config or DEFAULTS[engine]
    # containerd's own is only read, and what it imports is relative to the path that it is given.
    return Path(os.path.abspath(path) if engine == "containerd" else os.path.realpath(path))


def read(path: Path) -> Content:
    """What is at ``path``. Raises UsageError, naming it, for a file that is none, is too big, or is not UTF-8."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path}: is not a regular file")
            data = file.read(engine_config.MAX_BYTES + 1)
    except FileNotFoundError:
        return Content(None)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > engine_config.MAX_BYTES:
        raise UsageError(f"{path}: too big", f"at most {engine_config.MAX_BYTES} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start}: not UTF-8") from None
    return Content(text, stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid))


def _containerd_change(where: Path, program: str) -> Change:
    """The file that ``where`` imports; none is needed where the operator wrote the runtime into that itself."""
    config = read(where)
    if engine_config.containerd_has(config.text, program, str(where)):
        return Change(where, config, config.text)
    path, text = engine_config.containerd_drop_in(config.text, program, str(where))
    return Change(Path(path), _own_drop_in(Path(path)), text)


def _own_drop_in(path: Path) -> Content:
    """What is there, if it is Graft's. Raises ConflictError."""
    content = read(path)
    if content.text is not None and not engine_config.is_containerd_drop_in(content.text):
        raise engine_config.foreign(str(path), "a file")
    return content


def _carry_out(engine: str, change: Change, config: Path, program: str | None, dry_run: bool) -> Done:
    if dry_run or not change.is_needed:
        return Done(change)
    check = _CHECKS[engine](config, program)
    _write(change.path, change.before, change.after)
    try:
        check.run()
    except BaseException as error:
        _write(change.path, replace(change.before, text=change.after), change.before.text)
        if isinstance(error, engine_config.ByHandError):
            raise
        if isinstance(error, GraftError):
            raise GraftError(f"{change.path} is put back as it was: {error.message}", error.hint) from None
        raise
    after = _AFTER_UNINSTALL if program is None else _AFTER_INSTALL
    return Done(change, check.command, check.why_not, after[engine])


def _write(path: Path, old: Content, text: str | None) -> None:
    """Put ``text`` into the place of what is there, None: no file."""
    if text is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode(), old.mode, old.owner)


# ---- what engines say to it --------------------------------------------------------------------------


def _check_docker(config: Path, _program: str | None) -> Check:
    if shutil.which("dockerd") is None:
        return Check(why_not="dockerd is not installed")
    if "--validate" not in run(["dockerd", "--help"], _CHECK_TIMEOUT).out:
        return Check(why_not="this dockerd has no --validate")
    command = ["dockerd", "--validate", "--config-file", str(config)]
    return Check(" ".join(command[:2]), lambda: _ask(command))


def _check_podman(config: Path, program: str | None) -> Check:
    if shutil.which("podman") is None:
        return Check(why_not="podman is not installed")
    # A file elsewhere is read only by those who name it so; then podman reads no other.
    leading = [] if config.parent == _DROP_INS else ["env", f"CONTAINERS_CONF={config}"]
    with_runtime = [] if program is None else ["--runtime", NAME]
    command = [*leading, "podman", *with_runtime, "info", "--format", "{{.Host.OCIRuntime.Path}}"]

    def ask() -> None:
        said = _ask(command).strip()
        if program is not None and said != program:
            raise GraftError(f"podman says that the runtime {NAME} is {shown(said)}", "another file has it too")

    return Check(" ".join(["podman", *with_runtime, "info"]), ask)


def _check_containerd(config: Path, program: str | None) -> Check:
    if shutil.which("containerd") is None:
        return Check(why_not="containerd is not installed")
    command = ["containerd", "--config", str(config), "config", "dump"]
    before, _ = engine_config.without_containerd_runtime(_ask(command), "containerd config dump")

    def ask() -> None:
        after, found = engine_config.without_containerd_runtime(_ask(command), "containerd config dump")
        if program is not None and after != before:
            why = (
                "this containerd takes a file that is imported for the whole of its section, and would forget the rest"
            )
            raise engine_config.by_hand(read(config).text, program, str(config), why)
        if found != program:
            raise GraftError(f"containerd says that the runtime {NAME} is {shown(str(found))}")

    return Check("containerd config dump", ask)


_CHECKS: Mapping[str, Callable[[Path, str | None], Check]] = {
    "docker": _check_docker,
    "podman": _check_podman,
    "containerd": _check_containerd,
}


def _ask(command: list[str]) -> str:
    """What a command prints. Raises GraftError with the last line of its errors."""
    answer = run(command, _CHECK_TIMEOUT)
    if answer.status != 0:
        said = (answer.err.strip() or answer.out.strip() or f"status {answer.status}").splitlines()[-1]
        name = command[2] if command[0] == "env" else command[0]
        raise GraftError(f"{name} refuses it: {said}")
    return answer.out
