"""Paths and names of an installation: read once from the environment, so that tests never touch the machine's own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from graft.errors import UsageError

POLICIES = Path("/etc/graft/policies")
"""The operator's policies, which are found by their names, besides those in `POLICY_FOLDER`."""
POLICY_FOLDER = "policies"  # in the state directory


class Settings(NamedTuple):
    """Paths and names of one installation of Graft on one host.

    (No dataclass: `dataclasses` alone takes 5 ms to import, and every `graft run` has this module.)
    """

    host_netns: Path
    pin_dir: Path
    run_dir: Path
    state_dir: Path
    cache_dir: Path
    cgroup: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """The settings from ``environment`` (by default the process's own).

        Raises UsageError for a cgroup name that is not a plain path below the v2 mount.
        """
        env = os.environ if environment is None else environment
        cgroup = env.get("GRAFT_CGROUP", "graft").strip("/")
        if not re.fullmatch(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*", cgroup) or ".." in cgroup:
            raise UsageError(f"GRAFT_CGROUP: {cgroup!r} is not a cgroup name", "a name such as graft")
        return cls(
            host_netns=_host_netns(env.get("GRAFT_HOST_NETNS")),
            pin_dir=Path(env.get("GRAFT_PIN_DIR", "/sys/fs/bpf/graft")),
            run_dir=Path(env.get("GRAFT_RUN_DIR", "/run/graft")),
            state_dir=Path(env.get("GRAFT_STATE_DIR", "/var/lib/graft")),
            cache_dir=Path(env.get("GRAFT_CACHE_DIR", "/var/cache/graft")),
            cgroup=cgroup,
        )

    @property
    def environment(self) -> dict[str, str]:
        """The environment from which `from_environment` makes the same settings in another process."""
        return {
            "GRAFT_HOST_NETNS": str(self.host_netns),
            "GRAFT_PIN_DIR": str(self.pin_dir),
            "GRAFT_RUN_DIR": str(self.run_dir),
            "GRAFT_STATE_DIR": str(self.state_dir),
            "GRAFT_CACHE_DIR": str(self.cache_dir),
            "GRAFT_CGROUP": self.cgroup,
        }


def _host_netns(named: str | None) -> Path:
    """The namespace that counts as the host's: the one named, else that of pid 1.

    Even root may have no access to pid 1, where that has capabilities which root's shell lacks
    (ptrace(2), in some sandboxes). There the caller's own namespace is the host's.
    """
    if named is not None:
        return Path(named)
    first = Path("/proc/1/ns/net")
    try:
        first.stat()
    except PermissionError:
        return Path("/proc/self/ns/net")
    return first
