"""The record of a container: its name, and what is in no map. A file in run_dir that only root can read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.errors import UsageError
from graft.kernel import cgroup
from graft.kernel.atomic_file import PreparedFile, prepare_file
from graft.kernel.pidfd import MAX_PID
from graft.model import json_text
from graft.model.address import shown
from graft.model.settings import Settings
from graft.model.transport import Transport

_REQUIRED = {"id", "name", "cgroup", "transport", "netns", "policy", "endpoints"}
OPERATORS, ASKED, PAIRS = "operator", "asked", "pairs"
RUNTIME = "oci"
"""The engine of a container that Graft's OCI runtime has attached, which does not know what engine that is."""
_MAX_RECORD = 1 << 20
_MAX_ID, _MAX_COOKIE = (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Container:
    """An attached container. ``pid`` is the process that keeps its supervisors running (0: none is needed).

    ``cgroup_id`` distinguishes its cgroup from a later one at the same path; ``engine`` is what started it; ``relay``
    (splice, kernel) is how transport splice moves its bytes. ``unix_relay``: a rule for TCP leads to a unix socket.
    ``origin``: who has chosen its policy (`Origin` of graft/policy/model.py, in small letters); ``asked``: how much of
    the maps it has by one that it asked for itself; ``ruleset``: the number that its rules had when this was written
    (they get another one when an endpoint that they name is replaced).
    """

    id: int
    name: str
    cgroup: str
    transport: Transport
    netns: int
    policy: str
    endpoints: tuple[str, ...]
    pid: int = 0
    cgroup_id: int = 0
    engine: str = "graft"
    relay: str = "splice"
    unix_relay: bool = False
    asked: int = 0
    origin: str = OPERATORS
    ruleset: int = 0

    @property
    def is_operators(self) -> bool:
        """Whether the operator has chosen its policy. Else it has asked for it itself, as its image may have it do."""
        return self.origin == OPERATORS

    @property
    def cgroup_path(self) -> Path:
        """The folder of its cgroup in the v2 tree."""
        return Path(self.cgroup)

    @property
    def is_relayed(self) -> bool:
        """Whether graftd serves it."""
        return self.unix_relay or self.transport is Transport.SPLICE

    @property
    def is_populated(self) -> bool:
        """Whether there is any process in it."""
        return cgroup.populated(self.cgroup_path)

    @property
    def exists(self) -> bool:
        """Whether its cgroup still exists: the same one, not a later one at that path.

        May never return (`cgroup.has_id`): members.gone() asks this in a child.
        """
        with contextlib.suppress(OSError):
            if self.cgroup_id:
                return cgroup.has_id(self.cgroup_id)
        with contextlib.suppress(OSError):
            return self.cgroup_id in (0, cgroup.cgroup_id(self.cgroup_path))
        return False


def folder_of(settings: Settings) -> Path:
    """The folder of the records, one file for each container."""
    return settings.run_dir / "containers"


def save(settings: Settings, container: Container) -> None:
    """Write a container's record, in one step."""
    prepare(settings, container).commit()


def prepare(settings: Settings, container: Container) -> PreparedFile:
    """Write a container's record, and do not put it in its place yet. Raises OSError, and UsageError if it could not be
    read again: then nothing is left of it.
    """
    file = file_of(settings, container.id)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return prepare_file(file, encode_checked(container))


def are_any_prepared(settings: Settings) -> bool:
    """Whether there is a record that was prepared: by a command that is about to put it in its place, or was killed."""
    return any(_prepared(settings))


def finish_prepared(settings: Settings, is_in_force: Callable[[Container], bool]) -> None:
    """Put those in their places that tell of rules which are in force, and remove the others. Under the lock: they are
    all of killed commands. What has no record in its place is being removed.
    """
    for path in _prepared(settings):
        with contextlib.suppress(FileNotFoundError, UsageError):
            container = parse_record(path.read_bytes()[: _MAX_RECORD + 1], path.stem.removeprefix("."))
            place = file_of(settings, container.id)
            if place.exists() and is_in_force(container):
                path.rename(place)
        path.unlink(missing_ok=True)


def _prepared(settings: Settings) -> Iterator[Path]:
    return folder_of(settings).glob(".*.json.*")  # as graft/kernel/atomic_file.py names them


def file_of(settings: Settings, number: int) -> Path:
    """The file of the record of container ``number``."""
    return folder_of(settings) / f"{number}.json"


def encode_checked(container: Container) -> bytes:
    """What is in a record. Raises UsageError if it could not be read again: no command would find such a container."""
    raw = encode(container).encode()
    parse_record(raw, f"{container.id}.json")
    return raw


def encode(container: Container) -> str:
    """A container as text, which `decode` reads."""
    return json.dumps({**asdict(container), "transport": str(container.transport)})


def decode(text: str) -> Container:
    """The container in what `encode` made."""
    return parse_record(text.encode(), f"{json.loads(text)['id']}.json")


def parse_record(raw: bytes, name: str) -> Container:
    """The container in a record with the file name ``name``. Raises UsageError if the record is not valid."""
    found = json_text.mapping(json_text.parse(raw, name, _MAX_RECORD), name)
    if missing := _REQUIRED - found.keys():
        raise UsageError(f"{name}: no {' and no '.join(sorted(missing))}")
    try:
        number = json_text.number(found["id"], "id", _MAX_ID)
        container = Container(
            id=number,
            name=json_text.text(found["name"], "name"),
            cgroup=json_text.raw_path(found["cgroup"], "cgroup"),
            transport=Transport.parse(json_text.text(found["transport"], "transport")),
            netns=json_text.number(found["netns"], "netns", _MAX_COOKIE),
            policy=json_text.text(found["policy"], "policy"),
            endpoints=tuple(json_text.texts(found["endpoints"], "endpoints")),
            pid=json_text.number(found.get("pid"), "pid", MAX_PID),
            cgroup_id=json_text.number(found.get("cgroup_id"), "cgroup_id", _MAX_COOKIE),
            engine=json_text.text(found.get("engine"), "engine") or "graft",
            relay=json_text.text(found.get("relay"), "relay") or "splice",
            unix_relay=found.get("unix_relay") is True,
            asked=json_text.number(found.get("asked"), "asked", _MAX_ID),
            origin=_origin(found),
            ruleset=json_text.number(found.get("ruleset"), "ruleset", _MAX_ID),
        )
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}") from None
    if name != f"{number}.json" or not container.cgroup.startswith("/") or ".." in container.cgroup_path.parts:
        raise UsageError(f"{name}: id {number} at {shown(container.cgroup)} is not a container")
    return container


def _origin(found: Mapping[str, Any]) -> str:
    """Who has chosen the policy. Earlier records have no such field, but for how much it asked for."""
    if "origin" not in found:
        return ASKED if found.get("asked") else OPERATORS
    origin = json_text.text(found["origin"], "origin")
    if origin not in (OPERATORS, ASKED, PAIRS):
        raise UsageError(f"origin: {shown(origin)} is none of {OPERATORS}, {ASKED}, {PAIRS}")
    return origin


def read_all(settings: Settings) -> tuple[list[Container], list[UsageError]]:
    """Every attached container, oldest first; and an error for each record that cannot be read."""
    found, wrong = [], []
    for path in folder_of(settings).glob("*.json"):
        try:
            with path.open("rb") as file:
                found.append(parse_record(file.read(_MAX_RECORD + 1), path.name))
        except FileNotFoundError:  # it was removed just now
            continue
        except OSError as error:
            wrong.append(UsageError(f"{path}: cannot be read: {error.strerror}"))
        except UsageError as error:
            wrong.append(UsageError(f"{path.parent}/{error.message}"))
    return sorted(found, key=lambda container: container.id), wrong


def forget(settings: Settings, number: int) -> None:
    """Remove the record of container ``number``. Safe to repeat."""
    file_of(settings, number).unlink(missing_ok=True)


# ---- of a data plane that is gone -------------------------------------------------------------------
#
# When bpffs is unmounted, the maps can not be found any more, but the programs stay attached to the cgroups, with their
# maps. Such a container is confined as it was, and its record is put aside here, until it is attached again.


def _stale_folder(settings: Settings) -> Path:
    return settings.run_dir / "stale"


def put_aside(settings: Settings, container: Container) -> None:
    """Take a record out of the list: its data plane is gone."""
    folder = _stale_folder(settings)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = file_of(settings, container.id)
    file.rename(folder / file.name)


def put_aside_at(settings: Settings, path: Path) -> list[Path]:
    """The files of records that were put aside, of containers at that cgroup (and not of an earlier one there)."""
    found = [(file, one) for file, one in readable(_stale_folder(settings)) if one.cgroup == str(path)]
    with contextlib.suppress(FileNotFoundError):
        return [file for file, one in found if one.cgroup_id == cgroup.cgroup_id(path)]
    return []


def all_put_aside(settings: Settings) -> list[Container]:
    """All of them."""
    return [container for _, container in readable(_stale_folder(settings))]


def readable(folder: Path) -> list[tuple[Path, Container]]:
    """The records in a folder beside that of the others, with their files; without those that cannot be read."""
    found = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, UsageError):
            container = parse_record(path.read_bytes()[: _MAX_RECORD + 1], path.name)
            found.append((path, container))
    return found
