"""What an eighteenth reading found about `graft listen`: of a runtime that has ended (crun's `create`) it did not know
in which cgroup that was started, and took the operator's session for a container without a cgroup of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.conftest import graft_without
from tests.hostile.test_listener import can_connect
from tests.hostile.test_seventeenth_reading_images import CONNECTS
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.engines import v1_controllers
from tests.support.installation import Host
from tests.support.program import Program

pytestmark = pytest.mark.e2e

TRIES = 4  # where crun has not ended yet, its cgroup is known


def bundle(host: Host, folder: Path) -> Path:
    """A container whose image chooses an open policy."""
    policies = host.settings.state_dir / "policies"
    policies.mkdir(parents=True, exist_ok=True)
    (policies / "web.yaml").write_text("name: web\nopen: true\ndefault: {bind: deny, connect: deny}\n")
    root = folder / "rootfs"
    for name in ("bin", "proc", "dev", "sys", "tmp", "etc"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    subprocess.run(["crun", "spec"], cwd=folder, check=True)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["process"].update(terminal=False, args=["/bin/busybox", "sleep", "60"])
    config["process"]["env"].append("GRAFT_POLICY=web")
    config["linux"]["namespaces"] = [one for one in config["linux"]["namespaces"] if one["type"] != "cgroup"]
    config["linux"].pop("resources", None)
    config["mounts"] = [one for one in config["mounts"] if one["destination"] in ("/proc", "/dev")]
    trapped = {"names": ["bind", "connect", "listen"], "action": "SCMP_ACT_NOTIFY"}
    listener = str(host.settings.run_dir / "listener")
    config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": listener, "syscalls": [trapped]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def listening(host: Host, folder: Path, defence: str = "") -> Iterator[tuple[Program, Path]]:
    """`graft listen`, and the cgroup of an operator's session, where crun may be started by hand."""
    serving = host.start_command([*graft_without(defence), "listen"])
    serving.until("it listens", lambda: can_connect(host.settings.run_dir / "listener"))
    (folder / "v1").mkdir()
    with v1_controllers(folder / "v1"), new_cgroup("session") as session:
        try:
            yield serving, session
        finally:
            serving.stop()


@contextmanager
def created_by_hand(folder: Path, session: Path, number: int, own: bool) -> Iterator[str]:
    """`crun create` and `start`, in the operator's session; with a cgroup of its ``own``. Gives the container's id."""
    name = f"g{number}-{os.getpid()}"
    crun = [*in_cgroup(session), "crun", f"--cgroup-manager={'cgroupfs' if own else 'disabled'}"]
    for words in (["create", "--bundle", str(folder), name], ["start", name]):
        subprocess.run([*crun, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=60)
    try:
        yield name
    finally:
        subprocess.run([*crun, "delete", "--force", name], check=True)


def is_attached(serving: Program, name: str) -> bool:
    """What `graft listen` did with a container."""
    serving.until("a container", lambda: f"{name}: attached" in serving.said or f"{name}: refused" in serving.said)
    return f"{name}: attached" in serving.said


@pytest.mark.parametrize("defence", ["", "others in the cgroup"])
def test_the_operators_session_is_no_container(host: Host, tmp_path: Path, defence: str) -> None:
    folder, attached = bundle(host, tmp_path), 0
    with listening(host, tmp_path, defence) as (serving, session), host.netns.listener("127.0.0.1") as listener:
        command = [*in_cgroup(session), *host.netns.command(sys.executable, "-c", CONNECTS)]
        shell = host.start_command(command, talk=True)
        for number in range(TRIES):
            with created_by_hand(folder, session, number, own=False) as name:
                attached += is_attached(serving, name)
            if attached:
                break
        shell.tell(f"{listener.getsockname()[1]}\n")
        met = shell.until("an answer", lambda: shell.said.strip())
        host.remove_at(session)
    assert (attached, met) == ((1, "Permission denied") if defence else (0, "works"))


def test_a_container_with_a_cgroup_of_its_own_is_attached(host: Host, tmp_path: Path) -> None:
    folder = bundle(host, tmp_path)
    with listening(host, tmp_path) as (serving, session):
        for number in range(TRIES):
            with created_by_hand(folder, session, number, own=True) as name:
                assert is_attached(serving, name)
