"""One installation of Graft with its own host, pins, cgroup and folders, far from the machine's own."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from graft.datapath.layout import HookDecision
from graft.datapath.maps import Maps
from graft.kernel import cgroup
from graft.model.endpoint import parse_endpoint
from graft.model.settings import Settings
from graft.saved.store import Store
from graft.splice import client as splice
from graft.splice import control
from graft.state.installation import Installation
from graft.state.records import Container
from graft.swap.resource_limits import own_cgroup
from tests.support.namespaces import Netns
from tests.support.program import Program, start
from tests.support.shell import Result, Word, run
from tests.support.wait import until

GRAFT = Path(sys.executable).with_name("graft")
COMPILED = Path(__file__).parents[2] / "build" / "compiled"
"""Of the hooks as they are compiled, for all installations of all runs: else each `graft up` would take seconds."""
_ports = itertools.count(20001)
_names = itertools.count(1)


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, though nobody may have waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@dataclass(frozen=True, slots=True)
class Host:
    """The host that Graft serves in a test, a client beside it, and the command line that works on it."""

    netns: Netns
    client: Netns
    environment: dict[str, str]
    folder: Path
    started: list[Program] = field(default_factory=list)
    run_flags: tuple[str, ...] = ()
    """Of every `graft run`: ``--deny`` gives it transport born."""

    def with_transport(self, transport: str) -> Host:
        """The same host, where every `graft run` with rules has that transport: swap or born."""
        return replace(self, run_flags=("--deny",) if transport == "born" else ())

    @property
    def saving(self) -> Host:
        """The same host, where commands save what they change, as they do for an operator."""
        return replace(self, environment={**self.environment, "GRAFT_NO_SAVE": ""})

    @property
    def settings(self) -> Settings:
        """What a Graft command reads from the environment."""
        return Settings.from_environment(self.environment)

    @property
    def installation(self) -> Installation:
        """Its endpoints and containers, and the lock to change them."""
        return Installation(self.settings)

    @property
    def maps(self) -> Maps:
        """The pinned maps."""
        return Maps(self.settings.pin_dir)

    @property
    def cgroup(self) -> Path:
        """Graft's own cgroup."""
        return cgroup.v2_mount() / self.settings.cgroup

    def graft(self, *words: Word, status: int | None = 0, stdin: str | None = None, timeout: float = 60) -> Result:
        """The real command, which has to end with ``status`` (None: any)."""
        return run([GRAFT, *words], environment=self.environment, status=status, stdin=stdin, timeout=timeout)

    def endpoint(self, spec: str, proto: str = "any", netns: str | None = None, dual_stack: bool = False) -> str:
        """A new endpoint's name."""
        name = f"e{next(_names)}"
        with Installation.open(self.settings) as graft, graft.transaction() as change:
            change.endpoints.add(parse_endpoint(name, spec, proto, netns, dual_stack=dual_stack))
        return name

    def forget_endpoints(self) -> None:
        """Delete them all, in use or not, and what a test has saved: it would come back in another one."""
        if Store(self.settings).exists:
            Store(self.settings).forget_all()
        with self.installation as graft, graft.transaction() as change:
            for stored in graft.endpoints.listing():
                change.endpoints.delete(stored.endpoint.name, force=True)

    def stop_programs(self) -> None:
        """End what a test has started, the last one first."""
        for program in reversed(self.started):
            program.stop()
        self.started.clear()

    @staticmethod
    def port() -> int:
        """A port that no other test uses."""
        return next(_ports)

    @staticmethod
    def ports(count: int) -> int:
        """The first of ``count`` ports in a row that no other test uses."""
        first, *_ = (next(_ports) for _ in range(count))
        return first

    def start_command(self, command: Sequence[Word], talk: bool = False) -> Program:
        """A command that works on this installation, in the background; it ends with the test."""
        started = start(command, {**os.environ, **self.environment}, talk)
        self.started.append(started)
        return started

    def start(self, *words: Word, talk: bool = False) -> Program:
        """`graft run` with these words, in the background; it ends with the test."""
        return self.start_command([GRAFT, "run", *self.run_flags, *words], talk)

    def start_daemon(self, command: Sequence[Word] = (GRAFT,), descriptors: int | None = None) -> Program:
        """`graft daemon` in the place of one that runs, answering; with at most so many ``descriptors``. It has no
        keeper: its service manager does not listen.
        """
        splice.stop(self.settings)
        limits = [] if descriptors is None else ["prlimit", f"--nofile={descriptors}:{descriptors}"]
        daemon = self.start_command([*limits, "env", f"NOTIFY_SOCKET={self.folder}/none", *command, "daemon"])
        daemon.until("the daemon answers", lambda: control.ask(self.settings, {"do": "ping"}))
        return daemon

    def kill_daemon(self) -> None:
        """Kill graftd and its keeper, so that nothing of them is left, and nothing starts graftd again."""
        found = control.ask(self.settings, {"do": "ping"})
        assert found is not None
        os.kill(found["pid"], signal.SIGSTOP)
        for pid in (found["keeper"], found["pid"]):
            if pid:
                os.kill(pid, signal.SIGKILL)
                until("it is gone", partial(_is_gone, pid))

    def ps(self) -> list[dict[str, Any]]:
        """The records of `graft ps --json`."""
        return list(json.loads(self.graft("ps", "--json").stdout))

    def ps_of(self, path: Path) -> dict[str, Any]:
        """The record that `graft ps --json` has of a cgroup."""
        return next(one for one in self.ps() if one["cgroup"] == str(path))

    def run(
        self,
        rules: Sequence[Word],
        *command: Word,
        status: int | None = 0,
        stdin: str | None = None,
        timeout: float = 60,
    ) -> Result:
        """`graft run RULES -- COMMAND`, to its end."""
        return self.graft("run", *self.run_flags, *rules, "--", *command, status=status, stdin=stdin, timeout=timeout)

    def remove(self, container: Container) -> None:
        """Take a container's rules away, and do nothing about its sockets."""
        with self.installation.transaction() as change:
            change.containers.remove(container)

    def remove_at(self, path: Path) -> None:
        """Take away the rules of the container at a cgroup, if there is one. (`graft detach` takes far longer.)"""
        for one in self.installation.containers.listing():
            if one.cgroup == str(path):
                self.remove(one)

    def container(self, program: Program) -> Container:
        """The container that a started `graft run` has made."""
        return next(one for one in self.installation.containers.listing() if one.pid == program.process.pid)

    def supervisor(self, program: Program) -> int:
        """The process id of a program's supervisor; waits for one."""
        return program.until("a supervisor", lambda: self.supervisor_or_0(program))

    def supervisor_or_0(self, program: Program) -> int:
        """The same, but 0 where there is none just now."""
        keeper = program.process.pid
        container = next((one for one in self.installation.containers.listing() if one.pid == keeper), None)
        if container is None:
            return 0
        desks = {pid.value for pid in self.maps.desk_slots.keys()}  # noqa: SIM118
        return next((pid for pid in cgroup.processes(own_cgroup(self.settings, container.id)) if pid in desks), 0)

    def decisions(self, container: int) -> dict[HookDecision, int]:
        """How often the hooks decided what for a container."""
        return {
            HookDecision(key.decision): int(count.value)
            for key, count in self.maps.counters.items()
            if key.container == container
        }

    def leftovers(self) -> list[str]:
        """What is left of containers: records, cgroups, supervisors, map entries. Empty where none runs.

        The relays' daemon belongs to no container: without one it ends after some seconds.
        """
        found = [f"record of {one.name}" for one in self.installation.containers.listing()]
        found += [str(path) for path in self.cgroup.glob("run-*")]
        found += [f"supervisor {pid}" for pid in cgroup.processes(self.cgroup / "supervisors")]
        maps = self.maps
        for name in (
            "containers",
            "ingress",
            "egress",
            "egress_ports",
            "uses",
            "groups",
            "counters",
            "ferries",
            "berths",
        ):
            found += [f"entry of {name}" for _ in getattr(maps, name).keys()]  # noqa: SIM118
        return found
