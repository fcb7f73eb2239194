"""What a fourteenth reading found about the tools. Where a process outside keeps a container's connection locked,
`graft listen` waited for the container's supervisor, which cannot die then, `graft down` removed nothing, and `graft
ps` told of it for other containers. And `graft down` closed the sockets of services that had been detached before.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graft.datapath import attachments
from graft.errors import KernelError
from graft.kernel import cgroup, sockets
from graft.model.transport import Transport
from graft.policy.model import Policy
from graft.state import detached
from tests.hostile.conftest import graft_without
from tests.hostile.test_listener import can_connect, container, end, send
from tests.hostile.test_thirteenth_reading_listen import POLICY, giving, outside, sends
from tests.hostile.test_twelfth_reading_attach import in_cgroup
from tests.support.cgroups import attach_points, new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import HOST4, Netns, namespace
from tests.support.program import Program
from tests.support.puppet import puppet
from tests.support.shell import AS_NOBODY, Result, Word, run
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

CONTAINERS = 3
TOO_LONG = 10.0  # seconds; where it waits for them, it waits for five for each
NOT_REMOVED = 6  # the exit status of a KernelError


@dataclass(slots=True)
class Listening:
    """`graft listen` on a host, and the containers that it serves."""

    host: Host
    serving: Program
    folder: Path
    stack: ExitStack
    inside: Netns
    port: int
    far: socket.socket

    def serve_harmless(self, name: str) -> int:
        """A container that does nothing: its process id, when it is attached."""
        with self.inside.inside():
            pid, listener = self.stack.enter_context(container(self.stack.enter_context(new_cgroup(name))))
        send(self.host, name, pid, self.folder, [listener])
        self.serving.says(f"{name}: attached", 60)
        return pid

    def serve_hostile(self, name: str, blocks: bool = True) -> tuple[int, int]:
        """A container that has a connection of its own locked by a process outside, and with ``blocks`` its supervisor
        wait for the lock; and that process.
        """
        inbox, holder = self.stack.enter_context(outside())
        path = self.stack.enter_context(new_cgroup(name))
        with self.inside.inside():
            pid, listener, told = self.stack.enter_context(giving(path, inbox, self.port, listens=True))
        send(self.host, name, pid, self.folder, [listener])
        os.close(listener)
        self.serving.says(f"{name}: attached")
        told.send(b"x")
        for _ in range(2):
            self.stack.enter_context(self.far.accept()[0])
        until("its socket is locked", lambda: sends(holder))
        if blocks:
            told.send(b"x")
            until("its supervisor waits", lambda: self.record(name)["stuck"], timeout=30)
        return pid, holder

    def record(self, name: str) -> dict[str, Any]:
        """What `graft ps` says of a container."""
        return next(one for one in self.host.ps() if one["name"] == name)


@contextlib.contextmanager
def listening(host: Host, folder: Path, without: str = "") -> Iterator[Listening]:
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "config.json").write_text(json.dumps({"annotations": {"graft.policy": str(folder / "policy.yaml")}}))
    serving = host.start_command([*graft_without(without), "listen"])
    serving.until("graft listen listens", lambda: can_connect(host.settings.run_dir / "listener"))
    with ExitStack() as stack:
        port = host.port()
        far = stack.enter_context(host.netns.listener("127.0.0.1", port))
        inside = stack.enter_context(namespace("inside"))
        yield Listening(host, serving, folder, stack, inside, port, far)


# ---- supervisors that cannot die ------------------------------------------------------------------------------------


def attached_after(host: Host, folder: Path, without: str = "") -> float:
    """How long a container waits to be attached after others have ended whose supervisors cannot die."""
    with listening(host, folder, without) as one:
        ended = [one.serve_hostile(f"ends-{number}")[0] for number in range(CONTAINERS)]
        begun = time.monotonic()
        for pid in ended:
            end(pid)
        one.serving.says(f"ends-{CONTAINERS - 1}: ended", 60)
        one.serve_harmless("other")
        return time.monotonic() - begun


def test_supervisors_that_cannot_die_delay_no_other_container(host: Host, tmp_path: Path) -> None:
    assert attached_after(host, tmp_path) < TOO_LONG


def test_control_where_graft_listen_waits_for_them_they_do(host: Host, tmp_path: Path) -> None:
    assert attached_after(host, tmp_path, "supervisors waited for") > TOO_LONG


def test_what_has_not_died_is_reaped_later(host: Host, tmp_path: Path) -> None:
    with listening(host, tmp_path) as one:
        pid, holder = one.serve_hostile("ends")
        supervisor = one.record("ends")["stuck"][0]
        end(pid)
        one.serving.says("ends: ended")
        assert Path(f"/proc/{supervisor}").exists()
        os.kill(holder, signal.SIGKILL)
        until("it is reaped", lambda: not Path(f"/proc/{supervisor}").exists())


def stuck_of_others(host: Host, folder: Path, without: str = "") -> tuple[object, object]:
    """What `graft ps` says of a container's supervisor, and of another one's that waits for a lock."""
    with listening(host, folder) as one:
        one.serve_hostile("hostile")
        one.serve_harmless("healthy")
        shown = run([*graft_without(without), "ps", "--json"], environment=host.environment, status=0)
        records = {record["name"]: record for record in json.loads(shown.stdout)}
        return records["healthy"]["stuck"], records["hostile"]["stuck"]


def test_ps_tells_of_a_stuck_supervisor_for_its_own_container_only(host: Host, tmp_path: Path) -> None:
    healthy, hostile = stuck_of_others(host, tmp_path)
    assert healthy == [] and hostile


def test_control_where_supervisors_are_told_by_their_parent_it_is_all_containers(host: Host, tmp_path: Path) -> None:
    healthy, hostile = stuck_of_others(host, tmp_path, "own cgroups")
    assert healthy and healthy == hostile


# ---- `graft down` where a process of Graft's cannot die -------------------------------------------------------------


def down(host: Host, *words: Word, without: str = "") -> Result:
    return run([*graft_without(without), "down", *words], environment=host.environment, status=None, timeout=100)


@contextlib.contextmanager
def held(host: Host, folder: Path, blocks: bool) -> Iterator[tuple[Path, int]]:
    """A host where a container has ended, and a process of Graft's waits for a lock: the child that would close the
    connection, and with ``blocks`` its supervisor. Gives another cgroup, which is attached, and who has the lock.
    """
    host.graft("up")
    with new_cgroup("service") as path, puppet(path, host.netns.path, 0), listening(host, folder) as one:
        host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}")
        pid, holder = one.serve_hostile("ends", blocks)
        end(pid)
        one.serving.says("ends: ended", 60)
        one.serving.stop()
        until("a process waits", lambda: cgroup.processes(host.cgroup))
        yield path, holder


@pytest.mark.parametrize(
    "blocks",
    [True, pytest.param(False, marks=pytest.mark.skipif(not sockets.can_destroy(), reason="nothing closes it"))],
)
def test_down_removes_all_else_and_finishes_later(bare_host: Host, tmp_path: Path, blocks: bool) -> None:
    with held(bare_host, tmp_path, blocks) as (service, holder):
        assert attach_points(service)
        said = down(bare_host, "--force")
        assert said.returncode == NOT_REMOVED and said.stderr.count("\n") == 1
        assert f"cannot remove the cgroup {bare_host.cgroup}: " in said.stderr
        assert not attach_points(service) and cgroup.populated(service)
        assert not bare_host.settings.pin_dir.exists() and not bare_host.settings.run_dir.exists()
        assert attach_points(bare_host.cgroup / "supervisors")  # what is in there may still have sockets
        bare_host.graft("run", "--", "true")  # makes a new data plane meanwhile
        os.kill(holder, signal.SIGKILL)
        until("it can die", lambda: down(bare_host).returncode == 0, timeout=30)
        assert not bare_host.cgroup.exists() and not bare_host.settings.run_dir.exists()


def test_control_where_its_cgroup_comes_first_down_removes_nothing(bare_host: Host, tmp_path: Path) -> None:
    with held(bare_host, tmp_path, True) as (service, holder):
        assert down(bare_host, "--force", without="cgroup last").returncode == NOT_REMOVED
        assert attach_points(service) and bare_host.settings.pin_dir.exists()
        os.kill(holder, signal.SIGKILL)
        until("it can die", lambda: down(bare_host, "--force").returncode == 0, timeout=30)


def test_down_forgets_what_is_saved_all_the_same(bare_host: Host, tmp_path: Path) -> None:
    saving = bare_host.saving
    with held(bare_host, tmp_path, True) as (_, holder):
        saving.graft("ep", "add", "saved", "127.0.0.1:8080")
        assert down(saving, "--force", "--forget").returncode == NOT_REMOVED
        os.kill(holder, signal.SIGKILL)
        until("it can die", lambda: down(bare_host, "--force").returncode == 0, timeout=30)
        saving.graft("up")
        assert "saved" not in saving.graft("ep", "show").stdout


# ---- `graft down` after `graft detach` ------------------------------------------------------------------------------

SERVICE = """
import socket, sys, threading
def answer(one):
    with one:
        while data := one.recv(10): one.sendall(data)
def serve(port):
    listener = socket.create_server(("0.0.0.0", port))
    print("ready", flush=True)
    while True: threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
threading.Thread(target=serve, args=(int(sys.argv[1]),), daemon=True).start()
sys.stdin.readline()
serve(int(sys.argv[2]))
"""


def answers(one: socket.socket) -> bool:
    one.settimeout(5.0 * PATIENCE)
    with contextlib.suppress(OSError):
        one.sendall(b"hello")
        return one.recv(10) == b"hello"
    return False


def is_served(host: Host, port: int) -> bool:
    with contextlib.suppress(OSError), host.client.connected(HOST4, port) as one:
        return answers(one)
    return False


@contextlib.contextmanager
def service(host: Host, path: Path, ports: Sequence[int]) -> Iterator[subprocess.Popen[str]]:
    """A service in a cgroup that listens at the first port, and at the second one when it is told to."""
    with in_cgroup(host, path, *AS_NOBODY, "/usr/bin/python3", "-ISc", SERVICE, *ports) as program:
        yield program


def goes_on_after_down(host: Host, detach: Sequence[Word], *words: Word, without: str = "") -> list[bool]:
    """Whether a service that is attached, and detached, is served after `graft down`: at the port at which it listened
    before it was attached, at the one since then, and over a connection that it accepted under the policy.
    """
    host.graft("up")
    ports = [host.port(), host.port()]
    with new_cgroup("service") as path, service(host, path, ports) as program:
        grant = f"0.0.0.0:8080={host.endpoint('0.0.0.0:dynamic')}"
        host.graft("attach", "--cgroup", path, "-i", grant)
        assert program.stdin is not None and program.stdout is not None
        program.stdin.write("\n")
        program.stdin.flush()
        assert program.stdout.readline() == "ready\n"
        with host.client.connected(HOST4, ports[1]) as connection:
            assert answers(connection)
            if detach:
                host.graft(*detach, path)
            assert down(host, *words, without=without).returncode == 0
            return [is_served(host, ports[0]), is_served(host, ports[1]), answers(connection)]


DETACH = ["detach", "--cgroup"]


def create(host: Host, path: Path, prepare: Callable[[int], None]) -> None:
    """Put a cgroup under a policy, for transport direct."""
    with host.installation as graft:
        compiled = graft.compile(Policy("any"))
        with graft.transaction() as change:
            change.containers.create(compiled, path, host.netns.cookie, Transport.DIRECT, prepare=prepare)


def test_a_container_that_could_not_be_attached_counts_as_detached(
    bare_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its listeners may have been tagged by then."""

    def attach(*_: object, **__: object) -> None:
        raise KernelError("no")

    bare_host.graft("up")
    monkeypatch.setattr(attachments, "attach", attach)
    numbers: list[int] = []
    with new_cgroup("service") as path, pytest.raises(KernelError):
        create(bare_host, path, numbers.append)
    assert numbers and set(numbers) == detached.numbers(bare_host.settings)


def test_the_number_of_a_detached_container_may_be_another_ones_later(bare_host: Host) -> None:
    """A data plane that is made anew begins to count anew."""
    bare_host.graft("up")
    for number in range(100):
        detached.note(bare_host.settings, number)
    numbers: list[int] = []
    with new_cgroup("service") as path:
        create(bare_host, path, numbers.append)
    assert set(range(100)) - detached.numbers(bare_host.settings) == set(numbers)


def test_a_detached_service_goes_on_after_down(bare_host: Host) -> None:
    assert goes_on_after_down(bare_host, DETACH) == [True, True, True]


def test_an_attached_service_goes_on_after_down_by_force(bare_host: Host) -> None:
    assert goes_on_after_down(bare_host, [], "--force") == [True, True, True]


@pytest.mark.skipif(not sockets.can_destroy(), reason="down closes nothing before 6.9")
def test_control_where_nobody_knows_that_it_was_detached_it_is_closed(bare_host: Host) -> None:
    assert goes_on_after_down(bare_host, DETACH, without="detached") == [False, False, False]
