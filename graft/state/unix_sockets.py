"""Endpoints that are unix sockets of the host: what the maps have no room for, and the sockets that are bound now.

    run_dir/unix/ENDPOINT.json             path, owner and mode of an endpoint, by its id
    run_dir/unix/rule-KEY                  the path of a rule, by its key in the map `ingress`, to show it
    run_dir/unix/CONTAINER-ENDPOINT.bound  the file of a socket that a container has, or graftd for it, by both ids
    run_dir/unix/*.gone                    such a record, of a socket whose file is to be removed

All of it is root's only. Whoever binds a socket writes its record; whoever removes the container, the rule or the
endpoint releases it, whichever process has died meanwhile. The file is removed when the installation's lock is not held
any more: somebody may hold the file's folder (folder_calls.py). Then the next change tries again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from graft.datapath.maps import Maps
from graft.errors import UsageError
from graft.kernel import process, unix_files
from graft.kernel.atomic_file import write_atomically
from graft.kernel.unix_files import FileId, Target, UnixPathError
from graft.model import json_text
from graft.model.endpoint import Endpoint
from graft.model.settings import Settings
from graft.model.unix_socket import UNIX_FAMILY, UnixSocket, path_key
from graft.policy.model import Policy, UnixRule
from graft.state.folder_calls import in_folder_of

_MAX_BYTES = 1 << 16
_MAX_NUMBER = (1 << 64) - 1
Owner = tuple[int, int]


def _folder(settings: Settings) -> Path:
    return settings.run_dir / "unix"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, data)


# ---- endpoints --------------------------------------------------------------------------------------


def save(settings: Settings, endpoint: int, unix: UnixSocket | None) -> None:
    """Note what an endpoint is at. None: not a unix socket. Raises NotFoundError where there is no such owner."""
    path = _folder(settings) / f"{endpoint}.json"
    if unix is None:
        path.unlink(missing_ok=True)
        return
    owner_of(unix)
    _write(path, json.dumps({"path": unix.path, "owner": unix.owner, "mode": unix.mode}).encode())


def load(settings: Settings, endpoint: int) -> UnixSocket | None:
    """What an endpoint is at; None where it is not a unix socket. Raises UsageError where its file is damaged."""
    path = _folder(settings) / f"{endpoint}.json"
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    found = json_text.mapping(json_text.parse(raw, path.name, _MAX_BYTES), path.name)
    return UnixSocket(
        json_text.path(found.get("path"), "path"),
        json_text.text(found.get("owner"), "owner") or None,
        json_text.number(found.get("mode"), "mode", 0o777),
    )


def owner_of(unix: UnixSocket) -> Owner | None:
    """User and group that own the file; None where the operator named none. Raises NotFoundError."""
    if unix.owner is None:
        return None
    user = process.parse_user(unix.owner, "owner")
    return user.uid, user.gid


# ---- rules ------------------------------------------------------------------------------------------


def save_rules(settings: Settings, rules: tuple[UnixRule, ...]) -> None:
    """Note the paths of rules that are in the maps, to show them."""
    for rule in rules:
        raw = os.fsencode(rule.path)
        _write(_folder(settings) / f"rule-{path_key(raw).hex()}", raw)


def rule_path(settings: Settings, key: bytes) -> str:
    """The path of a rule, by its key in the map `ingress`, as it is written."""
    try:
        return os.fsdecode((_folder(settings) / f"rule-{key.hex()}").read_bytes())
    except FileNotFoundError:
        return f"(a path with the key {key.hex()})"


def tidy_rules(settings: Settings, maps: Maps) -> None:
    """Remove the paths of rules that are no more."""
    used = {bytes(key.addr).hex() for key in maps.ingress.keys() if key.family == UNIX_FAMILY}  # noqa: SIM118
    for path in _folder(settings).glob("rule-*"):
        if path.name.removeprefix("rule-") not in used:
            path.unlink(missing_ok=True)


# ---- bound sockets ----------------------------------------------------------------------------------


def bind(
    settings: Settings,
    container: int,
    endpoint: int,
    sock: socket.socket,
    unix: UnixSocket,
    shown: bytes,
    owner: Owner = (0, 0),
    backlog: int | None = None,
) -> FileId:
    """Bind ``sock`` at an endpoint, for a container, and record that. ``owner``: where the operator named none.

    The socket shows the address ``shown``. With a ``backlog`` it listens before anybody can find it. Raises
    UnixPathError, NotFoundError, OSError.
    """
    uid, gid = owner_of(unix) or owner
    dead = in_folder_of(unix.path, lambda: unix_files.check(unix.path))
    if dead is not None and any(file == dead for one, _, file in _records(settings) if one != container):
        hint = "an endpoint of its own for each"
        raise UnixPathError(errno.EADDRINUSE, f"{unix.path}: another container has it", hint)
    target = Target(unix.path, uid, gid, unix.mode)
    file = in_folder_of(unix.path, lambda: unix_files.bind(sock, target, shown, backlog), keep={sock.fileno()})
    if backlog is not None:
        sock.listen(backlog)  # again, by this process: its clients are shown who listened (SO_PEERCRED)
    _forget_released(settings, unix.path)
    record = {"path": unix.path, "device": file[0], "inode": file[1]}
    _write(_folder(settings) / f"{container}-{endpoint}.bound", json.dumps(record).encode())
    return file


def _records(settings: Settings) -> Iterator[tuple[int, Path, FileId]]:
    for record in _folder(settings).glob("*.bound"):
        with contextlib.suppress(UsageError, OSError, ValueError):
            yield int(record.stem.partition("-")[0]), record, _parse(record)[1]


def _parse(record: Path) -> tuple[str, FileId]:
    found = json_text.mapping(json_text.parse(record.read_bytes(), record.name, _MAX_BYTES), record.name)
    device, inode = (json_text.number(found.get(key), key, _MAX_NUMBER) for key in ("device", "inode"))
    return json_text.path(found.get("path"), "path"), (device, inode)


def release(settings: Settings, is_gone: Callable[[int, int], bool]) -> None:
    """Have `remove_released` remove the file of each (container, endpoint) that ``is_gone``. Safe to repeat."""
    for record in _folder(settings).glob("*.bound"):
        with contextlib.suppress(UsageError, OSError, ValueError):
            container, _, endpoint = record.stem.partition("-")
            if is_gone(int(container), int(endpoint)):
                record.rename(record.with_name(f"{record.stem}-{secrets.token_hex(8)}.gone"))


def remove_released(settings: Settings) -> None:
    """Remove the files of released sockets. Without the installation's lock: it may take some seconds. Safe to repeat;
    what cannot be removed now keeps its record.
    """
    for record in _folder(settings).glob("*.gone"):
        with contextlib.suppress(UsageError, UnixPathError, OSError, ValueError):
            path, file = _parse(record)
            in_folder_of(path, partial(unix_files.remove, path, file))
            record.unlink(missing_ok=True)


def _forget_released(settings: Settings, path: str) -> None:
    """A new socket has the path, and may have the inode number of an older one there."""
    for record in _folder(settings).glob("*.gone"):
        with contextlib.suppress(UsageError, OSError, ValueError):
            if _parse(record)[0] == path:
                record.unlink(missing_ok=True)


def check_free(policy: Policy, endpoints: Mapping[str, Endpoint]) -> None:
    """Raises UnixPathError where a socket could not be bound now at an endpoint that ``policy`` grants binds of, and
    NotFoundError where its owner does not exist.
    """
    for name in dict.fromkeys(rule.endpoint for rule in policy.every_ingress):
        unix = endpoints[name].unix
        if unix is not None:
            owner_of(unix)
            in_folder_of(unix.path, partial(unix_files.check, unix.path))
