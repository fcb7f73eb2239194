"""What is saved of an installation, as values. Nothing here depends on the present boot: no ids, no process numbers.

A cgroup is named by its path below the v2 mount, because the mount may be elsewhere after the next boot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from graft.errors import UsageError
from graft.model.address import shown
from graft.model.endpoint import Endpoint
from graft.model.transport import Transport
from graft.policy.model import Policy

ENGINES = {"cgroup": "cgroup", "docker": "docker", "podman": "podman", "unit": "systemd"}
"""What finds a container of each kind (graft/state/engines.py), by the word before the colon."""

_KINDS = {engine: kind for kind, engine in ENGINES.items()}
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MAX_PATH = 4095
_OF_A_PROCESS = re.compile(r"[0-9]+|/proc/.*", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """A container as `graft attach --cgroup` names it, without ambiguity: ``docker:web``."""

    kind: str
    name: str

    @property
    def text(self) -> str:
        """``KIND:NAME``."""
        return f"{self.kind}:{self.name}"

    @property
    def engine(self) -> str:
        """What finds it, as `graft ps` shows that."""
        return ENGINES[self.kind]

    @classmethod
    def of(cls, engine: str, name: str) -> Target | None:
        """That of a container in `graft ps`; None if Graft or its runtime started it: it ends with its program."""
        kind = _KINDS.get(engine)
        return None if kind is None or not name else cls(kind, name)


@dataclass(frozen=True, slots=True)
class LastSeen:
    """Where a container was when its policy was saved: its cgroup below the v2 mount, its id, its transport.

    Empty and None for what is not known.
    """

    cgroup: str = ""
    id: str = ""
    transport: Transport | None = None


@dataclass(frozen=True, slots=True)
class SavedAttachment:
    """A container and its policy. ``transport`` and ``relay`` are those that were asked for, None for none."""

    target: Target
    policy: Policy
    transport: Transport | None = None
    relay: str | None = None
    last: LastSeen = field(default_factory=LastSeen)


@dataclass(frozen=True, slots=True)
class SavedState:
    """All that is saved, each part sorted by name."""

    endpoints: tuple[Endpoint, ...] = ()
    attachments: tuple[SavedAttachment, ...] = ()


def saved_state(endpoints: list[Endpoint], attachments: list[SavedAttachment]) -> SavedState:
    """These, sorted."""
    by_name = sorted(endpoints, key=lambda one: one.name)
    return SavedState(tuple(by_name), tuple(sorted(attachments, key=lambda one: one.target)))


def outlives_boot(endpoint: Endpoint) -> bool:
    """Whether an endpoint means the same after a reboot: not if its namespace is named by a process."""
    return endpoint.netns is None or not _OF_A_PROCESS.fullmatch(endpoint.netns)


def parse_target(text: str, field: str = "container") -> Target:
    """The target in ``KIND:NAME``. Raises UsageError."""
    kind, _, name = text.partition(":")
    if kind not in ENGINES or not name or "\0" in name or len(name) > _MAX_PATH:
        raise UsageError(f"{field}: {shown(text)} is not a container", "docker:NAME, podman:, unit: or cgroup:PATH")
    if kind == "cgroup":
        parse_cgroup(name, field)
    elif "/" in name:
        raise UsageError(f"{field}: {shown(text)} is not a container", f"{kind}:NAME, without a /")
    return Target(kind, name)


def parse_cgroup(text: str, field: str = "cgroup") -> str:
    """A path below the v2 mount, relative to it. Raises UsageError."""
    if "\0" in text or len(text) > _MAX_PATH or any(part in ("", ".", "..") for part in text.split("/")):
        raise UsageError(f"{field}: {shown(text)} is not a path below the cgroup mount", "such as docker/web")
    return text


def parse_container_id(text: str, field: str = "id") -> str:
    """The id that an engine gave a container. Raises UsageError."""
    if not _CONTAINER_ID.fullmatch(text):
        raise UsageError(f"{field}: {shown(text)} is not a container's id", "64 hexadecimal digits")
    return text


def parse_asked_transport(text: str, field: str = "transport") -> Transport:
    """A transport that `graft attach` can give. Raises UsageError."""
    transport = Transport.parse(text, field)
    if transport.is_supervised:
        raise UsageError(f"{field}: a container in {text} is started by Graft, and not attached", "direct or splice")
    return transport
