"""Endpoints that are unix sockets of the host: what the maps have no room for.

    run_dir/unix/ENDPOINT.json   path, owner and mode of an endpoint, by its id
    run_dir/unix/rule-KEY        the path of a rule, by its key in the map `ingress`, to show it

All of it is root's only. The sockets that are bound at them are in bound_sockets.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from graft.datapath.maps import Maps
from graft.kernel import process
from graft.kernel.atomic_file import write_atomically
from graft.model import json_text
from graft.model.settings import Settings
from graft.model.unix_socket import UNIX_FAMILY, UnixSocket, path_key
from graft.policy.model import UnixRule

_MAX_BYTES = 1 << 16
Owner = tuple[int, int]


def folder(settings: Settings) -> Path:
    """Where all of it is."""
    return settings.run_dir / "unix"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, data)


# ---- endpoints --------------------------------------------------------------------------------------


def save(settings: Settings, endpoint: int, unix: UnixSocket | None) -> None:
    """Note what an endpoint is at. None: not a unix socket. Raises NotFoundError where there is no such owner."""
    path = folder(settings) / f"{endpoint}.json"
    if unix is None:
        path.unlink(missing_ok=True)
        return
    owner_of(unix)
    _write(path, json.dumps({"path": unix.path, "owner": unix.owner, "mode": unix.mode}).encode())


def load(settings: Settings, endpoint: int) -> UnixSocket | None:
    """What an endpoint is at; None where it is not a unix socket. Raises UsageError where its file is damaged."""
    path = folder(settings) / f"{endpoint}.json"
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
        _write(folder(settings) / f"rule-{path_key(raw).hex()}", raw)


def rule_path(settings: Settings, key: bytes) -> str:
    """The path of a rule, by its key in the map `ingress`, as it is written."""
    try:
        return os.fsdecode((folder(settings) / f"rule-{key.hex()}").read_bytes())
    except FileNotFoundError:
        return f"(a path with the key {key.hex()})"


def tidy_rules(settings: Settings, maps: Maps) -> None:
    """Remove the paths of rules that are no more."""
    noted = list(folder(settings).glob("rule-*"))
    if not noted:
        return  # mostly: what follows goes through the rules of all containers
    used = {bytes(key.addr).hex() for key in maps.ingress.keys() if key.family == UNIX_FAMILY}  # noqa: SIM118
    for path in noted:
        if path.name.removeprefix("rule-") not in used:
            path.unlink(missing_ok=True)
