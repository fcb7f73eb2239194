"""Engines with Graft's runtime: one of each for the whole session."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import oci
from tests.support.installation import Host
from tests.support.oci import Engine
from tests.support.plain import Plain, plain
from tests.support.wait import until


@pytest.fixture(scope="session")
def container_root(root: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What containers have as their root file system."""
    missing = [tool for tool in oci.NEEDED if shutil.which(tool) is None]
    assert not missing, f"make setup: missing {', '.join(missing)}"
    return oci.make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="session")
def _docker(_host: Host, container_root: Path) -> Iterator[Engine]:
    folder = Path(tempfile.mkdtemp(prefix="graft-docker-"))  # short: a socket's path has 107 bytes
    with oci.docker(_host, folder, container_root) as engine:
        yield engine
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def docker(host: Host, _docker: Engine) -> Iterator[Engine]:
    """A dockerd in the host's namespace that has the runtime `graft`. A test's containers go with it."""
    yield _docker
    _docker.remove_all()
    until("nothing of the containers is left", lambda: not oci.leftovers(host))


@pytest.fixture(scope="session")
def _podman(_host: Host, container_root: Path) -> Iterator[Engine]:
    folder = Path(tempfile.mkdtemp(prefix="graft-podman-"))
    with oci.podman(_host, folder, container_root, oci.runtime_script(_host, folder, "crun")) as engine:
        yield engine
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def podman(host: Host, _podman: Engine) -> Iterator[Engine]:
    """A podman in the host's namespace over Graft's runtime and crun. A test's containers go with it."""
    yield _podman
    _podman.remove_all()
    until("nothing of the containers is left", lambda: not oci.leftovers(host))


@pytest.fixture(params=["splice", "kernel"])
def relay(request: pytest.FixtureRequest) -> str:
    """How transport splice moves bytes: each test once for each."""
    return str(request.param)


@pytest.fixture
def container(host: Host, relay: str) -> Iterator[Plain]:
    """A container that runs without Graft."""
    with plain(host, relay) as made:
        yield made
