"""What a sixteenth reading found: what concerns one container of an engine kept its others from their policies; and
commands looked up a name of the fork server's in /proc, for which any user could have them wait.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graft.commands import watcher_process
from graft.commands.watcher import TRIES
from graft.kernel import surroundings
from graft.state import helper_process
from graft.swap import fork_client, fork_servers, waiter
from tests.e2e.conftest import _docker, _podman, container_root, docker, plain_engine, podman
from tests.e2e.test_saved_state import saver
from tests.hostile.test_eighth_reading_folders import running
from tests.hostile.test_fifteenth_reading_fork import server_without
from tests.hostile.test_fifteenth_reading_watcher import HOLDS_FOR_LONG, watch_without
from tests.hostile.test_ninth_reading_splice import forget_names
from tests.support.engines import Engine
from tests.support.installation import GRAFT, Host
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e
__all__ = ["_docker", "_podman", "container_root", "docker", "plain_engine", "podman", "saver"]


@contextmanager
def held(pid: int) -> Iterator[None]:
    """A user holds the folder in /proc of that process, and the kernel has forgotten what anybody looked up there."""
    with running([sys.executable, "-c", HOLDS_FOR_LONG, f"/proc/{pid}", "0"]):
        forget_names()
        yield


# ---- saved containers of one engine -----------------------------------------------------------------

SLEEPS = ("sleep", "600")
NAMES = ("aaa", "victim")


def start(engine: Engine, name: str, *flags: str) -> None:
    engine.started(name, list(flags), *SLEEPS, network="host")


@contextmanager
def saved_containers(saver: Host, engine: Engine) -> Iterator[None]:
    """Two containers that have a policy, and were removed."""
    try:
        for name in NAMES:
            start(engine, name)
            saver.graft("attach", "--cgroup", f"{engine.name}:{name}", "--deny")
        watcher_process.stop(saver.settings)
        engine.remove(*NAMES)
        until("they wait", lambda: set(states(saver).values()) == {"waiting"})
        yield
    finally:
        engine.remove_all()


def states(saver: Host) -> dict[str, str]:
    return {one["name"].rpartition(":")[2]: one["state"] for one in saver.ps()}


def states_after_all_tries(saver: Host) -> dict[str, str]:
    time.sleep(max(TRIES) + 3 * PATIENCE)
    return states(saver)


@pytest.mark.parametrize("defence", ["", "engine's fields"])
def test_what_an_image_says_of_itself_keeps_no_container_from_its_policy(
    saver: Host, plain_engine: Engine, tmp_path: Path, defence: str
) -> None:
    """Labels: an image's are the container's, and not the engine's. The control: it is without a policy."""
    labels = tmp_path / "labels"
    labels.write_text("".join(f"l{number}={'x' * 60_000}\n" for number in range(300)))
    with saved_containers(saver, plain_engine):
        start(plain_engine, "aaa", "--label-file", str(labels))
        start(plain_engine, "victim")
        watch_without(saver, defence)
        if defence:
            assert states_after_all_tries(saver) == {"aaa": "waiting", "victim": "attached"}
        else:
            until("they are attached", lambda: set(states(saver).values()) == {"attached"}, 45)


@pytest.mark.parametrize("plain_engine", ["podman"], indirect=True)
@pytest.mark.parametrize("defence", ["", "silent engine"])
def test_who_holds_a_process_of_one_container_keeps_no_other_one_from_its_policy(
    saver: Host, plain_engine: Engine, defence: str
) -> None:
    with saved_containers(saver, plain_engine):
        for name in NAMES:
            start(plain_engine, name)
        pid = plain_engine("container", "inspect", "--format", "{{.State.Pid}}", "aaa").stdout.strip()
        with held(int(pid)):
            watch_without(saver, defence)
            if defence:
                assert set(states_after_all_tries(saver).values()) == {"waiting"}
            else:
                until("the other one is attached", lambda: states(saver)["victim"] == "attached", 60)
                assert states(saver)["aaa"] == "waiting"
        if not defence:
            until("they are attached", lambda: set(states(saver).values()) == {"attached"}, 60)


# ---- who holds the folder of a fork server, or of its child -----------------------------------------


@contextmanager
def own_server(host: Host) -> Iterator[int]:
    """The host's fork server."""
    host.run([], "true")
    yield fork_servers.running(host.settings)[0]
    fork_servers.stop_all(host.settings)


@pytest.mark.parametrize("defence", ["", "server's stat"])
def test_who_holds_the_servers_folder_has_no_command_wait(
    host: Host, monkeypatch: pytest.MonkeyPatch, defence: str
) -> None:
    """A command that has waited a tenth of a second looks whether the server is stopped. The control: it hangs."""
    with server_without(host, monkeypatch, defence) if defence else own_server(host) as server:
        with held(server):
            os.kill(server, signal.SIGSTOP)
            command = subprocess.Popen([GRAFT, "run", "--", "true"], env={**os.environ, **host.environment})
            if defence:
                with pytest.raises(subprocess.TimeoutExpired):
                    command.wait(6)
            else:
                assert command.wait(10 * PATIENCE) == 0
        assert command.wait(10 * PATIENCE) == 0


PINS = """
import os, sys, time
from graft.kernel import surroundings
if sys.argv[1]:
    os.O_NOFOLLOW = 0
surroundings.pin_own()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("defence", ["", "of the links"])
def test_what_is_looked_up_of_a_servers_child_is_kept_by_it(root: None, defence: str) -> None:
    """The control: it keeps what the links lead to, of which the kernel forgets the names."""
    with running([sys.executable, "-c", PINS, defence]) as child:
        with held(child.pid):
            assert helper_process.run_one(lambda: not fork_client._is_stopped(child.pid), 3)
            found = helper_process.run_one(lambda: surroundings.of(child.pid), 3)
        assert found == (None if defence else surroundings.of(child.pid))


@pytest.mark.parametrize("not_compiled", ["", "1"])
def test_who_holds_a_waiters_folder_keeps_no_container_that_has_ended(
    host: Host, monkeypatch: pytest.MonkeyPatch, not_compiled: str
) -> None:
    """Where its server is gone: it tries that by its own folder, and then waits for a process that it has started."""
    monkeypatch.setitem(host.environment, waiter.NOT_COMPILED.decode(), not_compiled)
    process = host.start("--", "sleep", "600").process
    until("it waits", lambda: b"wait" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
    [sleeper] = children(process.pid)
    fork_servers.stop_all(host.settings)
    with held(process.pid):
        os.kill(sleeper, signal.SIGKILL)
        assert process.wait(20 * PATIENCE) == -signal.SIGKILL


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
