"""Targets of hostile programs, the places where these run, and hosts that lack a defence."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import installation
from tests.hostile.undefended import COMMAND
from tests.support.building import Programs
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import Netns
from tests.support.program import Program
from tests.support.shell import AS_NOBODY, Word, run

Victims = Callable[[int], "subprocess.Popen[bytes]"]
_numbers = itertools.count(1)


def graft_without(defence: str) -> list[Word]:
    """The command line without one of the defences of tests/hostile/undefended.py; "": with all of them."""
    return [sys.executable, COMMAND, defence] if defence else [GRAFT]


@pytest.fixture
def victims() -> Iterator[Victims]:
    """Starts a sleeping process of the user with that id, in a process group of its own."""
    started: list[subprocess.Popen[bytes]] = []

    def start(user: int) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"], user=user, group=user, extra_groups=[], process_group=0))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


Without = Callable[[str], Host]


@pytest.fixture(scope="session")
def _undefended(net: tuple[Netns, Netns], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Without]:
    made: dict[str, Host] = {}
    with ExitStack() as stack:

        def get(defence: str) -> Host:
            if defence not in made:
                tag = f"without-{len(made)}"
                one = stack.enter_context(installation(tmp_path_factory.mktemp("undefended"), *net, tag))
                run([*graft_without(defence), "up"], environment=one.environment, status=0)
                made[defence] = one
            return made[defence]

        yield get


@pytest.fixture
def without(_undefended: Without) -> Iterator[Without]:
    """Gives a host whose hooks lack a defence of tests/hostile/undefended.py. What a test starts there ends with it."""
    used: list[Host] = []

    def get(defence: str) -> Host:
        used.append(_undefended(defence))
        return used[-1]

    yield get
    for host in used:
        host.stop_programs()
        host.forget_endpoints()


def lines_of(program: Program, count: int) -> list[str]:
    """A program's output, as soon as that has so many lines."""
    program.until(f"{count} lines", lambda: len(program.said.splitlines()) >= count)
    return program.said.splitlines()


@dataclass(frozen=True, slots=True)
class Confined:
    """A program under a policy, run by the user nobody; its steps are those of tests/programs/calls.c."""

    host: Host
    program: Program
    cgroup: Path

    def lines(self, count: int) -> list[str]:
        """Its output, as soon as that has so many lines."""
        return lines_of(self.program, count)

    def resume(self) -> None:
        """Let it continue after a `wait` step."""
        self.program.tell("\n")


Confine = Callable[..., Confined]
TRANSPORTS = ("swap", "born", "direct")

LEAVES_INSIDE = {"to": "192.0.2.254/32", "action": "container"}
"""A rule that nothing in a test meets, and for which a container has transport swap instead of born."""


def for_transport(transport: str, policy: str) -> str:
    """The policy, changed in what no test looks at so that its container has that transport."""
    found = yaml.safe_load(policy)
    if transport == "swap":
        found["egress"] = [*(found.get("egress") or []), LEAVES_INSIDE]
    elif transport == "born":
        found["default"] = {"bind": "deny", "connect": "deny"}
    return str(yaml.safe_dump(found))


@pytest.fixture
def confine(programs: Programs, tmp_path: Path) -> Iterator[Confine]:
    """Starts calls.c with its steps: confine(host, transport, policy, *steps). It ends with the test.

    ``within``: the words before it (unshare, say). ``defence``: `graft run` lacks it.
    """
    with ExitStack() as stack:

        def make(
            host: Host, transport: str, policy: str, *steps: Word, within: Sequence[Word] = (), defence: str = ""
        ) -> Confined:
            number = next(_numbers)
            file = tmp_path / f"policy-{number}.yaml"
            file.write_text(for_transport(transport, policy))
            command: list[Word] = [*within, programs["calls"], *steps]
            if transport in ("swap", "born"):
                words: list[Word] = ["run", "--policy", file, "--user", "nobody", "--", *command]
                program = host.start_command([*graft_without(defence), *words], talk=True)
                path = Path(program.until("the container", lambda: _cgroup_of(host, program)))
                assert str(host.container(program).transport) == transport
                return Confined(host, program, path)
            path = stack.enter_context(new_cgroup(f"hostile-{number}"))
            host.graft("attach", "--cgroup", path, "--policy", file)
            stack.callback(lambda: host.remove_at(path))
            # As nobody, in that cgroup and the host's namespace.
            program = host.start_command([*in_cgroup(path), *host.netns.command(*AS_NOBODY, *command)], talk=True)
            stack.callback(program.stop)
            return Confined(host, program, path)

        yield make


def _cgroup_of(host: Host, program: Program) -> str:
    return next((one.cgroup for one in host.installation.containers.listing() if one.pid == program.process.pid), "")
