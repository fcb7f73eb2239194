"""The containers of a soak, one class for each way in which Graft serves one.

Each runs a server and a client of its own (worker.c), is started, stopped and started again, and gets its policy from a
file that has its name.
"""

from __future__ import annotations

import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.soak.excuses import Excuse, Failure, parse_worker
from tests.soak.services import Service
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.engines import Engine
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import Plain, plain
from tests.support.program import Program
from tests.support.shell import Word
from tests.support.wait import until

ALLOWED_PORT, FORBIDDEN_PORT = 9000, 9001
FORBIDDEN = ((CLIENT4, FORBIDDEN_PORT), (HOST4, FORBIDDEN_PORT))
"""Where somebody listens, and no policy leads to."""
_ANSWERS = f"{{to: {CLIENT4}, protocol: udp, endpoint: soak-out}}"


@dataclass
class Tally:
    """What the clients inside of a container have done, over all of its starts."""

    requests: int = 0
    forbidden: int = 0


class Box(ABC):
    """One container. ``port`` is its endpoint's, of the host."""

    kind: str
    more_policy = "default: deny\n"
    """What its policy has besides its rules."""
    moves_at_once = False
    """Whether a listener follows its endpoint to another port, without a restart."""
    survives_graftd = True
    """Whether connections outlive graftd."""

    def __init__(self, host: Host, service: Service, folder: Path, number: int, worker: Path) -> None:
        self.host, self.service, self._folder, self._worker = host, service, folder, worker
        self.name = f"{self.kind}-{service.name}-{number}"
        self.said = self.name.replace("-", "")
        self.endpoint, self.port = f"soak{number}", host.port()
        self.failures: list[Failure] = []
        self.excuses: list[Excuse] = []
        self.succeeded: list[str] = []
        self.tally = Tally()
        self.runs = False
        self._program: Program | None = None
        self._revision = 0
        folder.mkdir()
        for parent in (folder, *folder.parents[:2]):
            parent.chmod(0o755)
        host.graft("ep", "add", self.endpoint, f"0.0.0.0:{self.port}")

    # ---- its policy

    def write_policy(self) -> Path:
        """Its policy, which changes each time in what nobody notices."""
        self._revision += 1
        file = self.policy_file
        file.parent.mkdir(parents=True, exist_ok=True)
        unused = f"{{to: 192.0.2.{self._revision % 250 + 1}, action: deny}}"
        file.write_text(
            f"name: {self.name}\n{self.more_policy}"
            f"ingress: [{{bind: {self.service.bound!r}, endpoint: {self.endpoint}}}]\n"
            f"egress: [{{to: {CLIENT4}, ports: [{ALLOWED_PORT}], endpoint: soak-out}}, {_ANSWERS}, {unused}]\n"
        )
        return file

    @property
    def policy_file(self) -> Path:
        """Where it is."""
        return self._folder / "policy.yaml"

    def replace_policy(self) -> None:
        """By one that grants the same."""
        self.host.graft("policy", "apply", self.write_policy())

    def move(self) -> None:
        """Its endpoint to another port."""
        before, self.port = self.port, self.host.port()
        self.host.graft("ep", "set", self.endpoint, f"0.0.0.0:{self.port}")
        until(f"{before} is withdrawn", lambda: not self.moves_at_once or not self.host.netns.listens(before))

    # ---- its life

    def command(self) -> list[Word]:
        """What runs in it: the server, and the client as a child of its."""
        places = " ".join(f"{address} {port}" for address, port in ((CLIENT4, ALLOWED_PORT), *FORBIDDEN))
        server = shlex.join(map(str, self.server_command()))
        return ["sh", "-c", f"{self._worker_path()} {places} & exec {server}"]

    def server_command(self) -> Sequence[Word]:
        """The server alone."""
        return self.service.command(self._folder, self.said)

    def _worker_path(self) -> Path:
        return self._worker

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.write_policy()
        self._program = self._start()
        self._program.until(f"{self.name} listens", self.is_published, 60)
        self.runs = True

    def is_published(self) -> bool:
        """Whether the host listens on its endpoint."""
        return self.host.netns.listens(self.port)

    def stop(self) -> None:
        """End it, and count what its client has said."""
        self.runs = False
        program, self._program = self._program, None
        if program is None:
            return
        self._end(program)
        made, tried, failures, succeeded = parse_worker(self.name, program.said)
        self.tally.requests += made
        self.tally.forbidden += tried
        self.failures += failures
        self.succeeded += succeeded
        program.stop()
        until(f"{self.port} is free", lambda: not self.host.netns.listens(self.port), 30)

    def restart(self) -> None:
        """Stop and start it."""
        self.stop()
        self.start()

    @abstractmethod
    def _start(self) -> Program: ...

    def _end(self, program: Program) -> None:
        program.process.terminate()
        program.wait()

    def supervisor(self) -> int:
        """The process id of its supervisor, 0 where it has none now."""
        return 0

    def excuse(self, begun: float, why: str, rare: bool = False) -> None:
        """Its requests since then may have failed, until now."""
        self.excuses.append(Excuse(self.name, begun, time.monotonic(), why, rare))


class RunBox(Box):
    """Under `graft run`; by a policy that denies the rest, so its sockets are born on the host's stack."""

    kind = "born"

    def _start(self) -> Program:
        return self.host.start_command([GRAFT, "run", "--policy", self.policy_file, "--", *self.command()])

    def supervisor(self) -> int:
        """That of its `graft run`."""
        return 0 if self._program is None else self.host.supervisor_or_0(self._program)


class SwapBox(RunBox):
    """The same, by a policy that leaves the rest to the container's own stack."""

    kind, more_policy = "swap", ""


class DirectBox(Box):
    """A cgroup in the host's namespace, attached."""

    kind = "direct"

    def __init__(self, host: Host, service: Service, folder: Path, number: int, worker: Path) -> None:
        super().__init__(host, service, folder, number, worker)
        self._stack = ExitStack()

    def _start(self) -> Program:
        path = self._stack.enter_context(new_cgroup("soak"))
        words: list[Word] = ["--cgroup", path, "--transport", "direct", "--policy", self.policy_file]
        self.host.graft("attach", *words)
        self._stack.callback(lambda: self.host.graft("detach", "--cgroup", path))
        return self.host.start_command([*in_cgroup(path), *self.host.netns.command(*self.command())])

    def _end(self, program: Program) -> None:
        super()._end(program)
        self._stack.close()


class SpliceBox(Box):
    """A container that was started without Graft, in a namespace of its own, and is attached."""

    kind, relay = "splice", "splice"
    moves_at_once = True

    def __init__(self, host: Host, service: Service, folder: Path, number: int, worker: Path) -> None:
        super().__init__(host, service, folder, number, worker)
        self._stack = ExitStack()
        self.container: Plain | None = None

    def _start(self) -> Program:
        self.container = self._stack.enter_context(plain(self.host, self.relay))
        self.attach()
        return self.container.start(*self.command())

    def attach(self) -> None:
        """It, anew."""
        assert self.container is not None
        words: list[Word] = ["--relay", self.relay, "--policy", self.policy_file]
        self.host.graft("attach", "--cgroup", self.container.cgroup, *words)

    def _end(self, program: Program) -> None:
        super()._end(program)
        assert self.container is not None
        self.container.started.clear()
        self._stack.close()


class KernelBox(SpliceBox):
    """The same, relayed by the kernel: its connections are reset when graftd ends."""

    kind, relay = "kernel", "kernel"
    survives_graftd = False


class PodmanBox(Box):
    """A container of podman's with Graft's runtime."""

    kind, more_policy = "podman", "default: deny\nopen: true\n"

    def __init__(self, engine: Engine, service: Service, folder: Path, number: int, worker: Path) -> None:
        super().__init__(engine.host, service, folder, number, worker)
        self._engine = engine

    @property
    def policy_file(self) -> Path:
        """One of those that an image may name."""
        return self.host.settings.state_dir / "policies" / f"{self.name}.yaml"

    def server_command(self) -> Sequence[Word]:
        """With the configuration in the container."""
        where = Path("/tmp") / self.name
        (self._folder / "in").mkdir(exist_ok=True)
        words = self.service.command(self._folder / "in", self.said)
        file = self._folder / "in" / "nginx.conf"
        file.write_text(
            file.read_text().replace(str(self._folder / "in"), str(where)).replace("warn;", "warn; user root;", 1)
        )
        return [str(word).replace(str(self._folder / "in"), str(where)) for word in words]

    def _worker_path(self) -> Path:
        return Path("/tmp") / self.name / "worker"

    def _start(self) -> Program:
        words = self.command()
        target = self._folder / "in" / "worker"
        if not target.exists():
            target.write_bytes(self._worker.read_bytes())
            target.chmod(0o755)
        flags = ["--rm", "--name", self.name, "--network", "none", "--annotation", f"graft.policy={self.name}"]
        flags += ["-v", f"{self._folder / 'in'}:/tmp/{self.name}"]
        command = self._engine.command("run", *flags, *self._engine.image, *words)
        return self.host.start_command(["env", *(f"{k}={v}" for k, v in self._engine.environment.items()), *command])

    def _end(self, program: Program) -> None:
        self._engine.remove(self.name)
        program.wait()

    def supervisor(self) -> int:
        """That of the shim."""
        found = next((one for one in self.host.ps() if one["engine"] == "oci" and one["policy"] == self.name), None)
        return 0 if found is None else int(found["supervisor"] or 0)
