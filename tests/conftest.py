"""Fixtures, named for what they give. Nothing here touches the machine's own network, pins or cgroups."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from graft.datapath.dataplane import is_up
from graft.kernel import cgroup
from tests.support import namespaces
from tests.support.building import Programs
from tests.support.installation import COMPILED, GRAFT, Host
from tests.support.namespaces import Netns
from tests.support.shell import run

# How long an example takes says how busy the machine is, and nothing about Graft.
settings.register_profile("graft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("graft")

NEEDED = ("ip", "nsenter", "ss", "nginx", "iperf3", "curl", "gcc", "busybox", "webhook", "hey", "unshare")


# Tests of the whole machine: container engines (dockerd gives cgroup v2 a controller, with which crun does not start),
# and those that compare what is there before and after.
MACHINE_FIXTURES = {"podman", "docker", "_podman", "_docker"}
MACHINE_FILES = {
    "test_attach_engines.py",
    "test_bench.py",
    "test_born_engines.py",
    "test_datagram_engines.py",
    "test_docker.py",
    "test_eighth_reading_images.py",
    "test_in_containers.py",
    "test_lifecycle.py",
    "test_podman.py",
    "test_runtime_install.py",
    "test_soak.py",
    "test_sixth_reading_images.py",
}

LONG = "tests/hostile/test_fuzz.py"
"""A few tests that take a long time each: they need not stay together."""


def _group(item: pytest.Item) -> str:
    """What stays in one of several processes (pytest-xdist): the tests of a file, and those of the whole machine."""
    names: Any = getattr(item, "fixturenames", ())
    if item.path.name in MACHINE_FILES or MACHINE_FIXTURES & set(names):
        return "machine"
    return item.nodeid if item.nodeid.startswith(LONG) else item.location[0]


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own, which reads the groups, would come first
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups go first and the quick unit tests last, so that no process has to wait for another at the end
    (with --no-loadscope-reorder).
    """
    longest: dict[str, int] = {}
    for item in items:
        group = _group(item)
        item.add_marker(pytest.mark.xdist_group(group))
        is_unit = "tests/unit/" in item.nodeid
        longest.setdefault(group, 0 if item.nodeid.startswith(LONG) else 1 if group == "machine" else 2 + is_unit)
    items.sort(key=lambda item: longest[_group(item)])


def pytest_collection_finish(session: pytest.Session) -> None:
    """With --dist loadgroup, pytest-xdist writes a test's group into its id: without it, groups would be spread."""
    grouped = session.config.getoption("loadgroup", False)
    if grouped and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest-xdist does not group tests with this pytest (pyproject.toml)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure's text may have bytes that are no UTF-8 (names that tests give): pytest-xdist cannot send those."""
    report = yield
    text = str(report.longrepr or "")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        report.longrepr = text.encode(errors="backslashreplace").decode()
    return report


@contextmanager
def installation(folder: Path, host: Netns, client: Netns, tag: str) -> Iterator[Host]:
    """An installation of its own; nothing of it is left afterwards, whatever the test did."""
    name = f"graft-test-{os.getpid()}-{tag}"
    made = Host(
        host,
        client,
        {
            "GRAFT_HOST_NETNS": str(host.path),
            "GRAFT_PIN_DIR": f"/sys/fs/bpf/{name}",
            "GRAFT_RUN_DIR": str(folder / "run"),
            "GRAFT_STATE_DIR": str(folder / "state"),
            "GRAFT_CACHE_DIR": str(COMPILED),
            "GRAFT_CGROUP": name,
            "GRAFT_NO_SAVE": "1",  # the tests of what is saved take it away (tests/e2e/test_saved_state.py)
        },
        folder,
    )
    try:
        yield made
    finally:
        result = run([GRAFT, "down", "--force"], environment=made.environment)
        if made.cgroup.exists():
            cgroup.kill(made.cgroup)
            cgroup.remove(made.cgroup)
        for pins in (made.settings.pin_dir, made.settings.pin_dir.with_name(f"{name}-new")):
            shutil.rmtree(pins, ignore_errors=True)
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def root() -> None:
    """Fails the test, rather than skipping it, where it cannot do its work."""
    assert os.geteuid() == 0, "this test needs root"
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    assert not missing, f"make setup: missing {', '.join(missing)}"
    namespaces.sweep()


@pytest.fixture(scope="session")
def net(root: None) -> Iterator[tuple[Netns, Netns]]:
    """The namespaces of the host and of a client beside it."""
    with namespaces.host_and_client() as pair:
        yield pair


@pytest.fixture(scope="session")
def _host(net: tuple[Netns, Netns], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with installation(tmp_path_factory.mktemp("host"), *net, "main") as made:
        made.graft("up")
        yield made


@pytest.fixture
def host(_host: Host) -> Iterator[Host]:
    """A host with Graft up. What a test starts ends with it, and its endpoints are deleted."""
    if not is_up(_host.settings):
        _host.graft("up")
    yield _host
    _host.stop_programs()
    _host.forget_endpoints()


@pytest.fixture(scope="session")
def doctor_report(_host: Host) -> dict[str, dict[str, Any]]:
    """What `graft doctor --json` says of each feature, by the feature's name."""
    return {one["name"]: one for one in json.loads(_host.graft("doctor", "--json").stdout)}


@pytest.fixture
def bare_host(net: tuple[Netns, Netns], tmp_path: Path) -> Iterator[Host]:
    """A host on which Graft has never been up."""
    with installation(tmp_path, *net, "bare") as made:
        yield made
        made.stop_programs()


@pytest.fixture
def netns(root: None) -> Iterator[Callable[[], Netns]]:
    """Makes namespaces with nothing but lo."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(namespaces.namespace("extra"))


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Test programs in C, compiled when they are first asked for, where any user can start them."""
    with tempfile.TemporaryDirectory(prefix="graft-programs-") as folder:
        Path(folder).chmod(0o755)
        yield Programs(Path(folder))
