"""What a thirty-eighth reading found in containers of engines: by what a container, or its image, asked for itself it
came out of the policy that the operator had saved for it, and took others of its slice with it; one that was made
again elsewhere was not found.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from graft.commands import restore, watched_folders, watcher_process
from graft.errors import UsageError
from graft.kernel import cgroup
from graft.oci.request import policy_from_pairs
from graft.saved.store import Store
from tests.e2e.conftest import _docker, _podman, container_root, docker, podman
from tests.e2e.test_saved_state import watcher_of
from tests.hostile.conftest import graft_without
from tests.support import engines
from tests.support.cgroups import new_cgroup
from tests.support.engines import Engine
from tests.support.installation import GRAFT, Host
from tests.support.program import Program
from tests.support.shell import output
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(250)]
__all__ = ["_docker", "_podman", "container_root", "docker", "podman"]

WIDE = "name: wide\nopen: true\ndefault: {bind: container, connect: container}\n"
ASKS = ("-e", "GRAFT_POLICY=wide")
SLEEP = ("sleep", "600")
Start = Callable[..., str]


@pytest.fixture
def saving(host: Host) -> Iterator[Host]:
    """A host that saves what commands change, with an open policy that permits everything."""
    folder = host.settings.state_dir / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wide.yaml").write_text(WIDE)
    yield host.saving
    Store(host.settings).forget_all()
    until("the watcher ends", lambda: watcher_of(host) == 0, 30)


def alone(host: Host) -> None:
    """From now on nobody watches."""
    watcher_process.stop(host.settings)
    until("nobody watches", lambda: watcher_of(host) == 0)


@pytest.fixture
def found(podman: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """podman with Graft's runtime, which this process and its watcher find."""
    for name, value in podman.environment.items():
        monkeypatch.setitem(os.environ, name, value)
    return podman


@pytest.fixture
def plain(found: Engine) -> Engine:
    """The same, without Graft's runtime."""
    return found.without_graft()


@pytest.fixture
def undefended(host: Host, found: Engine, tmp_path: Path) -> Engine:
    """The same, by a runtime that does not look at what is saved."""
    command = [*graft_without("saved outranks"), "runtime"]
    return replace(found, runtime=("--runtime", str(engines.runtime_script(host, tmp_path, "crun", command))))


def may_bind(host: Host, engine: Engine, name: str) -> bool:
    """Whether the container can listen at a port of the host's, of its own choice."""
    done = engine("exec", name, "httpd", "-p", f"0.0.0.0:{host.port()}", "-h", "/tmp", status=None)
    assert done.returncode == 0 or "Permission denied" in done.stderr, done.stderr
    return done.returncode == 0


# ---- what a container asks for, and what is saved for it --------------------------------------------


@pytest.mark.parametrize("pairs", [",", " , ", ",,"])
def test_pairs_without_a_pair_are_no_policy(pairs: str) -> None:
    """It would have no rules, and leave everything as it is: with the host's network, that is everything."""
    with pytest.raises(UsageError, match="GRAFT_CONV_PAIRS: no pair"):
        policy_from_pairs(pairs, {})


@pytest.mark.parametrize("without", [False, True], ids=["", "control"])
def test_one_that_starts_again_has_what_is_saved_before_its_program_runs(
    saving: Host, found: Engine, undefended: Engine, without: bool
) -> None:
    engine, port = undefended if without else found, saving.port()
    program = ("sh", "-c", f"httpd -p 0.0.0.0:{port} -h /tmp; echo bound $?; exec sleep 600")
    engine.started("web", ["--log-driver", "k8s-file", *ASKS], *program, network="host")
    assert last_said(engine, 1) == "bound 0"
    saving.graft("attach", "--cgroup", "podman:web", "--deny")
    alone(saving)
    engine("restart", "-t", "0", "web")
    assert last_said(engine, 2) == ("bound 0" if without else "bound 1")
    if not without:
        assert [(one["name"], one["engine"], one["state"]) for one in saving.ps()] == [("web", "podman", "attached")]


def last_said(engine: Engine, starts: int) -> str:
    """What the container's program has said of its bind, when it has started so many times."""

    def lines() -> list[str]:
        return engine("logs", "web").stdout.splitlines()

    until("it has tried", lambda: len(lines()) >= starts)
    return lines()[starts - 1]


@pytest.mark.parametrize("without", [False, True], ids=["", "control"])
def test_one_that_was_made_again_has_what_is_saved_and_not_what_its_image_asks_for(
    saving: Host, found: Engine, monkeypatch: pytest.MonkeyPatch, without: bool
) -> None:
    found.started("web", [], *SLEEP, network="host")
    saving.graft("attach", "--cgroup", "podman:web", "--deny")
    assert not may_bind(saving, found, "web")
    alone(saving)
    found.remove("web")
    found.started("web", ASKS, *SLEEP, network="host")
    if without:
        monkeypatch.setattr(restore, "_is_chosen", lambda container, saved: True)
    with saving.installation as graft:
        assert restore.restore(graft).waiting == {}
        assert [one.policy for one in graft.containers.listing()] == ["wide" if without else "podman-web"]
    assert may_bind(saving, found, "web") == without


# ---- a slice that is saved --------------------------------------------------------------------------


@pytest.fixture
def apps(saving: Host) -> Iterator[Path]:
    """A cgroup whose policy, to deny everything, is saved; it is not there, as after a boot, and nobody watches."""
    path = cgroup.v2_mount() / f"graft-apps-{os.getpid()}"
    path.mkdir()
    saving.graft("attach", "--cgroup", path, "--deny")
    alone(saving)
    path.rmdir()
    yield path
    if path.exists():
        saving.remove_at(path)
        cgroup.kill(path)
        cgroup.remove(path)


@pytest.mark.parametrize("without", [False, True], ids=["", "control"])
def test_one_that_asks_for_a_policy_does_not_start_in_a_slice_that_is_saved(
    saving: Host, found: Engine, undefended: Engine, apps: Path, without: bool
) -> None:
    engine, flags = undefended if without else found, ["--cgroup-parent", f"/{apps.name}"]
    done = engine.container(["-d", "--name", "evil", *flags, *ASKS], *SLEEP, network="host", status=None)
    if without:
        assert done.returncode == 0, done.stderr
        assert may_bind(saving, engine, "evil")
    else:
        assert done.returncode and f"the operator's for cgroup:{apps.name} is saved" in done.stderr
    engine.remove("evil", status=None)


@pytest.mark.parametrize("without", [False, True], ids=["", "control"])
def test_one_that_has_asked_keeps_a_slice_from_no_policy(
    saving: Host, undefended: Engine, apps: Path, monkeypatch: pytest.MonkeyPatch, without: bool
) -> None:
    flags = ["--cgroup-parent", f"/{apps.name}"]
    undefended.started("evil", [*flags, *ASKS], *SLEEP, network="host")
    undefended.started("victim", flags, *SLEEP, network="host")
    assert may_bind(saving, undefended, "evil")
    if without:
        monkeypatch.setattr(restore, "_is_asked_below", lambda *_: False)
    with saving.installation as graft:
        waiting = restore.restore(graft).waiting
        attached = [one.cgroup for one in graft.containers.listing()]
    if without:
        assert "lies above" in waiting[f"cgroup:{apps.name}"]
    else:
        assert (waiting, attached) == ({}, [str(apps)])
    assert [may_bind(saving, undefended, name) for name in ("evil", "victim")] == [without, without]
    undefended.remove("evil", "victim")


# ---- where an engine makes a container again --------------------------------------------------------


def in_four_folders(_top: Path) -> tuple[list[str], list[str]]:
    """Where containers were looked for before: none of this test's are there (others' may be)."""
    return [], []


@pytest.mark.parametrize("without", [False, True], ids=["", "control"])
@pytest.mark.parametrize("moves", [False, True], ids=["same parent", "another parent"])
def test_one_that_was_made_again_is_found_wherever_that_was(
    saving: Host, plain: Engine, monkeypatch: pytest.MonkeyPatch, moves: bool, without: bool
) -> None:
    with new_cgroup("first") as first, new_cgroup("second") as second:
        plain.started("web", ["--cgroup-parent", f"/{first.name}"], *SLEEP, network="host")
        saving.graft("attach", "--cgroup", "podman:web", "--deny")
        alone(saving)
        plain.remove("web")
        parent = second if moves else first
        plain.started("web", ["--cgroup-parent", f"/{parent.name}"], *SLEEP, network="host")
        if without:
            monkeypatch.setattr(restore, "container_folders", in_four_folders)
        with saving.installation as graft:
            assert restore.restore(graft).waiting == ({"podman:web": restore.NOT_THERE} if without else {})
        assert may_bind(saving, plain, "web") == without
        plain.remove("web")


@pytest.fixture
def pods(plain: Engine, container_root: Path, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Starts a pod of that name, with a cgroup of its own: that is the one of its first container."""
    archive = tmp_path / "root.tar"
    output(["tar", "-C", container_root, "-cf", archive, "bin", "etc", "tmp", "proc", "sys", "dev", "run"])
    plain("import", archive, "localhost/infra")
    first = ["--infra-image", "localhost/infra", "--infra-command", "/bin/sleep 600", "--network", "host"]

    def start(name: str) -> None:
        plain("pod", "create", *first, "--name", name)
        plain("pod", "start", name)

    yield start
    plain("pod", "rm", "-a", "-f", "-t", "0")
    for left in (cgroup.v2_mount() / "libpod_parent").glob("*/"):  # podman leaves it where cgroup v1 is in use too
        if re.fullmatch("[0-9a-f]{64}", left.name) and not cgroup.populated(left):
            left.rmdir()


@pytest.mark.parametrize("without", [False, True], ids=["", "control"])
def test_the_watcher_watches_a_pod_that_was_made_again(
    saving: Host, plain: Engine, pods: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, without: bool
) -> None:
    """As long before its container as it likes: nothing is tried any more when that starts."""
    pods("first")
    plain("run", "-d", "--pod", "first", "--name", "web", *plain.image, *SLEEP)
    saving.graft("attach", "--cgroup", "podman:web", "--deny")
    state, _ = Store(saving.settings).read()
    alone(saving)
    plain("pod", "rm", "-f", "-t", "0", "first")
    pods("second")
    if without:
        monkeypatch.setattr(watched_folders, "POD_NAME", re.compile("none"))
    watched = watched_folders.interests(cgroup.v2_mount(), state)
    plain("run", "-d", "--pod", "second", "--name", "web", *plain.image, *SLEEP)
    with saving.installation as graft:
        assert restore.restore(graft).waiting == {}
        [path] = [one.cgroup_path for one in graft.containers.listing()]
    assert (path.parent in watched and watched[path.parent].matches(path.name)) != without
    assert not may_bind(saving, plain, "web")


def test_what_is_watched_nowhere_is_looked_for_all_the_same() -> None:
    """Every 30 seconds; what is found by its path or its unit is made at a place that is watched."""
    assert restore.Restored(waiting={"podman:web": restore.NOT_THERE}).may_succeed_later
    assert not restore.Restored(waiting={"cgroup:apps": restore.NOT_THERE}).may_succeed_later


# ---- `exec`, when `graft listen` was started again --------------------------------------------------


def listening(host: Host) -> Program:
    """`graft listen`, which listens."""
    program = host.start_command([GRAFT, "listen"])
    with socket.socket(socket.AF_UNIX) as client:
        path = str(host.settings.run_dir / "listener")
        program.until("it listens", lambda: client.connect_ex(path) == 0)
    return program


def test_an_exec_that_no_process_can_serve_is_refused_with_the_reason(
    saving: Host, plain: Engine, tmp_path: Path
) -> None:
    """crun names no process in its message, and no bundle: only who has attached the container knows it."""
    first = listening(saving)
    port, profile = saving.ports(2), tmp_path / "profile.json"
    profile.write_text(saving.graft("seccomp-profile").stdout)
    rules = "ingress: [{bind: '*:80', endpoint: web}, {bind: '*:81', endpoint: two}]"
    policy = saving.settings.state_dir / "policies" / "served.yaml"
    policy.write_text(
        f"name: served\nopen: true\nendpoints: {{web: 0.0.0.0:{port}, two: 0.0.0.0:{port + 1}}}\n{rules}\n"
    )
    flags = ["--security-opt", f"seccomp={profile}", "-e", "GRAFT_POLICY=served"]
    plain.started("c", flags, "httpd", "-f", "-p", "80", "-h", "/tmp")
    until("it is served", lambda: saving.netns.listens(port))
    first.process.kill()
    first.process.wait()
    later = listening(saving)
    plain("exec", "-d", "c", "httpd", "-f", "-p", "81", "-h", "/tmp")
    later.says("refused: its message names no process, and this `graft listen` has not attached the container")
    assert "ended" not in later.said and saving.netns.listens(port), "the container goes on"
    plain.remove("c")
    later.process.terminate()
    assert later.wait() == 0
