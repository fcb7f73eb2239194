"""What hostile programs are tried on, where they run, and hosts that lack a defence."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.conftest import installation
from tests.hostile.undefended import COMMAND
from tests.support.building import Programs
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import Netns
from tests.support.program import Program, start
from tests.support.shell import Word, run

Victims = Callable[[int], "subprocess.Popen[bytes]"]
_numbers = itertools.count(1)


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
                run([sys.executable, COMMAND, defence, "up"], environment=one.environment, status=0)
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
        for program in reversed(host.started):
            program.stop()
        host.started.clear()
        host.forget_endpoints()


def lines_of(program: Program, count: int) -> list[str]:
    """What a program has said, when it has said so many lines."""
    program.until(f"{count} lines", lambda: len(program.said.splitlines()) >= count)
    return program.said.splitlines()


@dataclass(frozen=True, slots=True)
class Confined:
    """A program of nobody's under a policy; its steps are those of tests/programs/calls.c."""

    host: Host
    program: Program
    cgroup: Path

    def lines(self, count: int) -> list[str]:
        """What it has said, when it has said so many lines."""
        return lines_of(self.program, count)

    def goes_on(self) -> None:
        """Let it take its next steps."""
        self.program.tell("\n")


Confine = Callable[..., Confined]
TRANSPORTS = ("swap", "direct")


@pytest.fixture
def confine(programs: Programs, tmp_path: Path) -> Iterator[Confine]:
    """Starts calls.c with its steps: confine(host, transport, policy, *steps). It ends with the test.

    ``within``: what is to run it (unshare, say). ``defence``: `graft run` lacks it.
    """
    with ExitStack() as stack:

        def make(
            host: Host, transport: str, policy: str, *steps: Word, within: Sequence[Word] = (), defence: str = ""
        ) -> Confined:
            number = next(_numbers)
            file = tmp_path / f"policy-{number}.yaml"
            file.write_text(policy)
            command: list[Word] = [*within, programs["calls"], *steps]
            if transport == "swap":
                rules: list[Word] = ["--policy", file, "--user", "nobody", "--"]
                program = started(host, defence, *rules, *command, talk=True)
                path = Path(program.until("the container", lambda: _cgroup_of(host, program)))
                return Confined(host, program, path)
            path = cgroup.v2_mount() / f"hostile-{os.getpid()}-{number}"
            path.mkdir()
            stack.callback(lambda: cgroup.remove(path))
            host.graft("attach", "--cgroup", path, "--policy", file)
            stack.callback(lambda: host.graft("detach", "--cgroup", path, status=None))
            program = _start_direct(host, path, command)
            stack.callback(program.stop)
            return Confined(host, program, path)

        yield make


def undefended(defence: str, command: str = "run") -> list[Word]:
    """`graft run`, or another command, without that defence of tests/hostile/undefended.py; "": with all of them."""
    return [sys.executable, COMMAND, defence, command] if defence else [GRAFT, command]


def started(host: Host, defence: str, *words: Word, talk: bool = False) -> Program:
    """The same in the background, with these words; it ends with the test."""
    host.started.append(start([*undefended(defence), *words], {**os.environ, **host.environment}, talk))
    return host.started[-1]


def _cgroup_of(host: Host, program: Program) -> str:
    return next((one.cgroup for one in host.installation.containers.listing() if one.pid == program.process.pid), "")


def _start_direct(host: Host, path: Path, command: list[Word]) -> Program:
    """``command`` as nobody, in that cgroup and the host's namespace."""
    enter = f'echo 0 >{path}/cgroup.procs && exec "$@"'
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", *command]
    return start(["sh", "-c", enter, "-", "nsenter", f"--net={host.netns.path}", *as_nobody], talk=True)
