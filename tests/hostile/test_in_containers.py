"""What root tries: in a container of podman's, and in a user and a pid namespace, under `graft run` and in direct."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hostile.conftest import Confine, Victims, Without, graft_without, lines_of
from tests.support import engines
from tests.support.building import Programs
from tests.support.engines import Engine
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.program import Program, start
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = pytest.mark.e2e

NAMESPACES = ("unshare", "-Urpf", "--")
PLACES = ("podman", "swap", "direct")
ROOT = 0

Podman = Callable[[Host, str], Engine]


@pytest.fixture(scope="module")
def podman(programs: Programs) -> Iterator[Podman]:
    """podman over Graft's runtime and crun, for a host. The runtime lacks that defence, none where it is "".

    Its containers have nothing but two static programs.
    """
    made: dict[tuple[Path, str], Engine] = {}
    with ExitStack() as stack:

        def folder() -> Path:
            path = Path(tempfile.mkdtemp(prefix="graft-podman-"))
            stack.callback(lambda: shutil.rmtree(path, ignore_errors=True))
            path.chmod(0o755)  # for containers with users of their own
            return path

        root = folder()
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp"):
            (root / name).mkdir()
        for name in ("calls", "killing"):
            shutil.copy(programs.build(name, "-static"), root / "bin" / name)

        def get(host: Host, defence: str = "") -> Engine:
            key = host.folder, defence
            if key not in made:
                command = [*graft_without(defence), "runtime"] if defence else None
                made[key] = stack.enter_context(engines.podman(host, folder(), root, command))
            return made[key]

        yield get


def with_policy(host: Host, text: str) -> Sequence[Word]:
    """How podman names that policy."""
    folder = host.settings.state_dir / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tried.yaml").write_text(text)
    return "-e", "GRAFT_POLICY=tried"


def end(program: Program) -> None:
    """End its input, and wait for it: the first process of a pid namespace takes no SIGTERM."""
    assert program.process.stdin is not None
    program.process.stdin.close()
    program.wait()


@contextlib.contextmanager
def contained(engine: Engine, text: str, *command: Word) -> Iterator[Program]:
    """A program of root's in a container, which ends with its input."""
    flags = ["run", "-i", "--rm", "--cap-add", "NET_RAW", *engine.run_flags, *with_policy(engine.host, text)]
    program = start(engine.command(*flags, *engine.image, *command), {**os.environ, **engine.environment}, talk=True)
    try:
        yield program
        end(program)
    finally:
        program.stop()
        until("nothing of the container is left", lambda: not engines.leftovers(engine.host))


# ---- sockets --------------------------------------------------------------------------------------------------------

OTHER_PORT = 40851
"""A port that no endpoint names."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of it, each with a socket of its own that a refused connection has left with the host."""

    named: tuple[str, str, bool]
    """A bind of OTHER_PORT, a listen; whether it is heard there."""
    unnamed: tuple[str, bool]
    """A listen at a port of the kernel's choice, whether it is heard there."""
    connected: str
    """A connect to a service on the host's loopback."""
    routed: str
    """An option of IP's for its packets."""


IP_OPTIONS = 4
RECORD_ROUTE, SOURCE_ROUTE = "0707040000000000", "830b0401020304010203040100000000"
ROUTE = {"podman": SOURCE_ROUTE, "swap": RECORD_ROUTE, "direct": RECORD_ROUTE}
"""Anybody may have a packet's way recorded. To name it takes CAP_NET_RAW in the host's own user namespace."""

Try = Callable[[Host, str], Tried]


def is_heard(host: Host, port: int) -> bool:
    with contextlib.suppress(OSError):
        host.client.connected(HOST4, port, timeout=0.5).close()
        return True
    return False


@pytest.fixture(scope="module")
def _known() -> dict[tuple[Path, str], Tried]:
    return {}


@pytest.fixture
def tried(podman: Podman, confine: Confine, _known: dict[tuple[Path, str], Tried]) -> Try:
    """All of it, in one program for each host and place: a container takes its time."""

    def get(host: Host, place: str) -> Tried:
        key = host.folder, place
        if key not in _known:
            _known[key] = everything(host, place, podman, confine)
        return _known[key]

    return get


def everything(host: Host, place: str, podman: Podman, confine: Confine) -> Tried:
    text = (
        f"name: tried\nopen: true\nendpoints: {{web: '0.0.0.0:{host.port()}', out: '0.0.0.0:dynamic'}}\n"
        f"ingress: [{{bind: '*:80', endpoint: web}}]\negress: [{{to: {CLIENT4}, endpoint: out}}]\ndefault: deny\n"
    )
    with_host: list[Word] = ["make", 2, 1, 0, "connect", CLIENT4, 9]
    with contextlib.closing(host.netns.listener("127.0.0.1")) as service:
        steps = [*with_host, "bind32", "0.0.0.0", OTHER_PORT, "listen32"]
        steps += [*with_host, "listen32", "name"]
        steps += [*with_host, "connect32", "127.0.0.1", service.getsockname()[1]]
        steps += [*with_host, "bytes", 0, IP_OPTIONS, ROUTE[place], "wait"]
        with ExitStack() as stack:
            if place == "podman":
                program = stack.enter_context(contained(podman(host, ""), text, "/bin/calls", *steps))
            else:
                program = confine(host, place, text, *steps, within=NAMESPACES).program
                stack.callback(end, program)
            said = lines_of(program, 14)
            assert [said[at : at + 2] for at in (0, 4, 8, 11)] == [["make ok", "connect ECONNREFUSED"]] * 4
            port = int(said[7].split()[-1])
            named, unnamed = is_heard(host, OTHER_PORT), is_heard(host, port)
    return Tried((said[2], said[3], named), (said[6], unnamed), said[10], said[13])


@pytest.mark.parametrize("place", PLACES)
def test_root_listens_at_no_port_that_no_endpoint_names(host: Host, tried: Try, place: str) -> None:
    bind, listen, heard = tried(host, place).named
    assert (bind, heard) == ("bind32 EACCES", False), listen


@pytest.mark.parametrize("place", PLACES)
def test_control_without_hooks_root_does(without: Without, tried: Try, place: str) -> None:
    assert tried(without("hooks"), place).named == ("bind32 ok", "listen32 ok", True)


@pytest.mark.parametrize("place", PLACES)
def test_root_is_heard_nowhere_after_a_32_bit_listen(host: Host, tried: Try, place: str) -> None:
    assert tried(host, place).unnamed == ("listen32 ok", False)


@pytest.mark.parametrize("place", PLACES)
def test_control_without_hooks_root_is_heard(without: Without, tried: Try, place: str) -> None:
    assert tried(without("hooks"), place).unnamed == ("listen32 ok", True)


@pytest.mark.parametrize("place", PLACES)
def test_root_connects_to_no_destination_that_nobody_granted(host: Host, tried: Try, place: str) -> None:
    assert tried(host, place).connected == "connect32 EACCES"


@pytest.mark.parametrize("place", PLACES)
def test_control_without_hooks_root_connects(without: Without, tried: Try, place: str) -> None:
    assert tried(without("hooks"), place).connected == "connect32 ok"


@pytest.mark.parametrize("place", PLACES)
def test_root_gives_its_packets_no_options(host: Host, tried: Try, place: str) -> None:
    assert tried(host, place).routed == "bytes EPERM"


@pytest.mark.parametrize("place", PLACES)
def test_control_without_hooks_root_gives_them(without: Without, tried: Try, place: str) -> None:
    assert tried(without("hooks"), place).routed == "bytes ok"


# ---- signals --------------------------------------------------------------------------------------------------------

TO_CLIENT = (
    f"name: tried\nopen: true\nendpoints: {{out: '0.0.0.0:dynamic'}}\negress: [{{to: {CLIENT4}, endpoint: out}}]\n"
)
WAYS = {
    "user namespace": ("unshare", "-Ur", "--", "process"),
    "user and pid namespace": ("namespaces",),
}
"""What `killing` is run by, and its way."""


def ended(victim: subprocess.Popen[bytes], within: float) -> int | None:
    """The signal that ended it, None where it lives."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return -victim.wait(within)
    return None


def kills(host: Host, programs: Programs, whom: int, way: str, defence: str = "") -> None:
    """A refused connection, of a socket whose signal is to be SIGKILL to that process of the host's."""
    *within, how = WAYS[way]
    command: list[Word] = ["run", "--user", "nobody", "-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}", "--"]
    command += [*within, programs["killing"], how, whom, "connect", CLIENT4, 9]
    result = run([*graft_without(defence), *command], environment=host.environment, status=0)
    assert result.stdout == "connect ECONNREFUSED\n"


@pytest.mark.parametrize("way", WAYS)
def test_root_of_a_namespace_kills_no_process_of_the_hosts(
    host: Host, programs: Programs, victims: Victims, way: str
) -> None:
    victim = victims(ROOT)
    kills(host, programs, victim.pid, way)
    assert ended(victim, 0.2) is None


@pytest.mark.parametrize("way", WAYS)
def test_control_where_signals_are_carried_as_root_it_kills(
    host: Host, programs: Programs, victims: Victims, way: str
) -> None:
    victim = victims(ROOT)
    kills(host, programs, victim.pid, way, "signals")
    assert ended(victim, 10) == signal.SIGKILL


def kills_from_a_container(engine: Engine, whom: int) -> None:
    """The same by root of a container that has users of its own, and sees the host's processes."""
    users = "0:100000:65536"
    flags: list[Word] = ["--rm", "--uidmap", users, "--gidmap", users, "--pid", "host"]
    flags += with_policy(engine.host, TO_CLIENT)
    attack = ["/bin/killing", "process", str(whom), "connect", CLIENT4, "9"]
    assert engine.container(flags, *attack).stdout == "connect ECONNREFUSED\n"
    until("nothing of the container is left", lambda: not engines.leftovers(engine.host))


def test_root_of_a_container_kills_no_process_of_the_hosts(host: Host, podman: Podman, victims: Victims) -> None:
    victim = victims(ROOT)
    kills_from_a_container(podman(host, ""), victim.pid)
    assert ended(victim, 0.2) is None


def test_control_where_signals_are_carried_as_root_a_container_kills(
    host: Host, podman: Podman, victims: Victims
) -> None:
    victim = victims(ROOT)
    kills_from_a_container(podman(host, "signals"), victim.pid)
    assert ended(victim, 10) == signal.SIGKILL
