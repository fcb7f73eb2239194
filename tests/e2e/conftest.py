"""Containers of all kinds: engines with Graft's runtime, cgroups and processes in them, containers without Graft."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import engines
from tests.support.cgroups import new_cgroup
from tests.support.engines import Engine
from tests.support.installation import Host
from tests.support.plain import Plain, plain
from tests.support.puppet import Puppet, puppet
from tests.support.wait import until

MakeCgroup = Callable[..., Path]
StartPuppet = Callable[..., Puppet]
WritePolicy = Callable[[str], Path]


@pytest.fixture(scope="session")
def container_root(root: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root file system of containers."""
    missing = [tool for tool in engines.NEEDED if shutil.which(tool) is None]
    assert not missing, f"make setup: missing {', '.join(missing)}"
    return engines.make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="session")
def _docker(_host: Host, container_root: Path) -> Iterator[Engine]:
    folder = Path(tempfile.mkdtemp(prefix="graft-docker-"))  # short: a socket's path has 107 bytes
    with engines.docker(_host, folder, container_root) as engine:
        yield engine
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def docker(host: Host, _docker: Engine) -> Iterator[Engine]:
    """A dockerd in the host's namespace that has the runtime `graft`. A test's containers are removed with it."""
    yield _docker
    _remove_containers(host, _docker)


@pytest.fixture(scope="session")
def _podman(_host: Host, container_root: Path) -> Iterator[Engine]:
    folder = Path(tempfile.mkdtemp(prefix="graft-podman-"))
    with engines.podman(_host, folder, container_root) as engine:
        yield engine
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def podman(host: Host, _podman: Engine) -> Iterator[Engine]:
    """A podman in the host's namespace over Graft's runtime and crun. A test's containers are removed with it."""
    yield _podman
    _remove_containers(host, _podman)


def _remove_containers(host: Host, engine: Engine) -> None:
    engine.remove_all()
    until("nothing of the containers is left", lambda: not engines.leftovers(host))


@pytest.fixture(params=["docker", "podman"])
def plain_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Each engine without Graft's runtime, found by Graft's own commands too."""
    engine: Engine = request.getfixturevalue(request.param).without_graft()
    for name, value in engine.environment.items():
        monkeypatch.setitem(os.environ, name, value)
    return engine


@pytest.fixture
def make_cgroup(host: Host) -> Iterator[MakeCgroup]:
    """Makes cgroups outside Graft's own, below a parent or not; they are detached and removed afterwards."""
    with ExitStack() as stack:

        def make(parent: Path | None = None) -> Path:
            path = stack.enter_context(new_cgroup("attached", parent))
            stack.callback(lambda: host.remove_at(path))
            return path

        yield make


@pytest.fixture
def start_puppet(host: Host, make_cgroup: MakeCgroup) -> Iterator[StartPuppet]:
    """Starts a process in a cgroup: in the host's namespace and as root, unless others are named."""
    with ExitStack() as stack:
        yield lambda path, netns=host.netns.path, user=0: stack.enter_context(puppet(path, netns, user))


@pytest.fixture
def write_policy(tmp_path: Path) -> WritePolicy:
    """Writes a policy to a file of its own."""
    numbers = itertools.count(1)

    def write(text: str) -> Path:
        path = tmp_path / f"policy-{next(numbers)}.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(params=["splice", "kernel"])
def relay(request: pytest.FixtureRequest) -> str:
    """The relay of transport splice: each test once for each."""
    return str(request.param)


@pytest.fixture
def container(host: Host, relay: str) -> Iterator[Plain]:
    """A container that runs without Graft."""
    with plain(host, relay) as made:
        yield made
