"""What Graft has of the machine's: descriptors, map entries, processes, cgroups, namespaces, memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.kernel import cgroup
from graft.splice import control
from tests.support.installation import Host
from tests.support.namespaces import PREFIX

_MAPS = "containers", "ingress", "egress", "egress_ports", "uses", "groups", "relays"
"""Those whose entries stay as long as what they are for."""
_AGING_MAPS = "ferries", "berths", "exchanges", "exchange_clients", "stand_ins", "stand_in_ports", "offers"
"""Those whose entries come with what a container does, and go when it has not done that for a while, or ends."""


@dataclass(frozen=True, slots=True)
class Account:
    """At one moment. Memory is in kB, proportional (PSS of /proc/PID/smaps_rollup, proc(5))."""

    descriptors: int
    entries: int
    processes: int
    cgroups: int
    namespaces: int
    memory: int

    def excess(self, before: Account) -> list[str]:
        """What there is more of than before, beyond what a pool or a cache may have."""
        allowed = {"descriptors": 100, "entries": 40, "processes": 0, "cgroups": 0, "namespaces": 0}
        allowed["memory"] = max(20_000, before.memory // 4)
        found = {name: getattr(self, name) - getattr(before, name) for name in self.__slots__}
        return [f"{found[name]} {name} more than before" for name in found if found[name] > allowed[name]]


def processes(host: Host) -> list[int]:
    """Those of Graft's that serve: supervisors, graftd, its keeper. (The fork server comes and goes.)"""
    found = [pid for path in host.cgroup.glob("supervisors/**/cgroup.procs") for pid in cgroup.processes(path.parent)]
    graftd = control.ask(host.settings, {"do": "ping"}) or {}
    return [*found, *(graftd[name] for name in ("pid", "keeper") if graftd.get(name))]


def _memory(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def _namespaces(pids: Sequence[int]) -> int:
    return len({os.readlink(f"/proc/{pid}/ns/net") for pid in pids})


def account(host: Host) -> Account:
    """Now; nothing may change meanwhile."""
    pids, maps = processes(host), host.maps
    return Account(
        descriptors=sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        entries=sum(len(getattr(maps, name).keys()) for name in _MAPS),
        processes=len(pids),
        cgroups=sum(1 for _ in host.cgroup.rglob("cgroup.procs")),
        namespaces=len(list(Path("/run/netns").glob(f"{PREFIX}-{os.getpid()}-*"))) + _namespaces(pids),
        memory=sum(_memory(pid) for pid in pids),
    )


def left(host: Host) -> list[str]:
    """What is there of containers, though none is."""
    maps = host.maps
    counts = {name: len(getattr(maps, name).keys()) for name in (*_MAPS, *_AGING_MAPS)}
    return [*host.leftovers(), *(f"{count} entries of {name}" for name, count in counts.items() if count)]
