"""How one container of an OCI runtime is attached, and where it is: its cgroup and its network namespace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graft.errors import RefusedError
from graft.kernel import cgroup, netns
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.policy.model import Policy
from graft.state import members

_ID_LENGTH = 64  # of an engine's id, which is in the name of the container's cgroup
_SHARED, _ENGINE = "the container has no cgroup (v2) of its own: it shares its engine's", "an engine that creates one"


@dataclass(frozen=True, slots=True)
class Plan:
    """How to attach one container.

    ``folder`` is the shim's own, None where it has none; ``engine_cgroup`` is where the runtime was started, None where
    that is unknown.
    ``killable``, ``datagrams``: as `Keeper` asks for them.
    """

    settings: Settings
    policy: Policy
    transport: Transport
    id: str
    folder: Path | None
    engine_cgroup: Path | None
    killable: bool = False
    datagrams: bool = False


def is_engines_id(container_id: str) -> bool:
    """Whether an engine has made it, which names the container's cgroup after it; not somebody who typed it."""
    return len(container_id) == _ID_LENGTH


def find_container(pid: int, plan: Plan) -> tuple[Path, int]:
    """The cgroup and the namespace's cookie of a container, by its first process. Raises GraftError, OSError."""
    path = _apart(plan, lambda: _whole_cgroup_of(pid, plan))
    if path == cgroup.v2_mount() or (plan.engine_cgroup is not None and plan.engine_cgroup.is_relative_to(path)):
        raise RefusedError(_SHARED, _ENGINE)
    cookie = netns.cookie(pid)
    shared = cookie == netns.cookie(plan.settings.host_netns)
    if shared != (plan.transport is Transport.DIRECT):
        raise RefusedError("the container's network namespace is not the one in its configuration")
    return path, cookie


def cgroup_of(pid: int, plan: Plan) -> Path:
    """The cgroup of a process that a container's runtime names. Raises GraftError, OSError."""
    return _apart(plan, lambda: cgroup.of_process(pid))


def _apart(plan: Plan, work: Callable[[], Path]) -> Path:
    """The result of ``work``, which looks into a folder of /proc that somebody may hold. Raises GraftError, OSError.

    `graft listen` serves other containers too, so there a child looks.
    """
    return work() if plan.folder is not None else members.answer_about(f"container {plan.id[:12]} in /proc", work)


def _whole_cgroup_of(pid: int, plan: Plan) -> Path:
    """The container's cgroup, by its first process. Raises KernelError, OSError; RefusedError where an engine names
    cgroups after containers, and it is none of these.
    """
    path = cgroup.whole_of_process(pid)
    if plan.folder is None and is_engines_id(plan.id):
        # That process does not wait (`graft listen`): it may have made a cgroup below the container's already, and a
        # namespace with its root there, while it still has a mount of the first one. The engine's name is above both.
        from graft.state.engines import cut_at_id

        own = cut_at_id(path, plan.id)
        if own is None:
            raise RefusedError(_SHARED, _ENGINE)
        return own
    if plan.engine_cgroup is None and _has_others(path):
        raise RefusedError(_SHARED, _ENGINE)
    return path


def _has_others(path: Path) -> bool:
    """Whether a process in the cgroup has this one's mounts: it is none of the container's, which has its own root."""
    own = Path("/proc/self/ns/mnt").stat().st_ino
    for pid in cgroup.processes(path):
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{pid}/ns/mnt").stat().st_ino == own:
                return True
    return False
