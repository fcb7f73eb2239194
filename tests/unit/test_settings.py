"""Settings from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.errors import UsageError
from graft.model.settings import Settings


def test_an_empty_environment_gives_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "stat", lambda _: None)  # as if the user had access to process 1
    assert Settings.from_environment({}) == Settings(
        host_netns=Path("/proc/1/ns/net"),
        pin_dir=Path("/sys/fs/bpf/graft"),
        run_dir=Path("/run/graft"),
        state_dir=Path("/var/lib/graft"),
        cache_dir=Path("/var/cache/graft"),
        cgroup="graft",
    )


def test_every_path_can_be_set() -> None:
    places = {
        "GRAFT_HOST_NETNS": "/run/netns/h",
        "GRAFT_PIN_DIR": "/sys/fs/bpf/x",
        "GRAFT_RUN_DIR": "/tmp/run",
        "GRAFT_STATE_DIR": "/tmp/state",
        "GRAFT_CACHE_DIR": "/tmp/cache",
        "GRAFT_CGROUP": "machine.slice/graft-x",
    }
    found = Settings.from_environment(places)
    assert found == Settings(
        Path("/run/netns/h"),
        Path("/sys/fs/bpf/x"),
        Path("/tmp/run"),
        Path("/tmp/state"),
        Path("/tmp/cache"),
        "machine.slice/graft-x",
    )


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_PIN_DIR", "/sys/fs/bpf/from-environment")
    assert Settings.from_environment().pin_dir == Path("/sys/fs/bpf/from-environment")


@pytest.mark.parametrize("name", ["", "/", "..", "a/../b", "a//b", "a b", "a\n", "ä", "a/.."])
def test_a_cgroup_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="GRAFT_CGROUP"):
        Settings.from_environment({"GRAFT_CGROUP": name})
