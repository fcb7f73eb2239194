"""What a fifteenth reading found about `graft listen`, and about other processes of root's that live long: who holds
their folder in /proc, which every user can, keeps them from nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.conftest import graft_without
from tests.hostile.test_eighth_reading_folders import running
from tests.hostile.test_fifteenth_reading_watcher import HOLDS_FOR_LONG
from tests.hostile.test_listener import container, send
from tests.hostile.test_ninth_reading_splice import forget_names
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.program import Program
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e


def bundle(folder: Path, **more: Any) -> Path:
    """The bundle of a container that asks for a policy."""
    folder.mkdir()
    (folder / "policy.yaml").write_text("name: p\n")
    config = {"annotations": {"graft.policy": str(folder / "policy.yaml")}, **more}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def serving_without(host: Host, defence: str) -> Program:
    """`graft listen` without a defence, or with all of them."""
    serving = host.start_command([*graft_without(defence), "listen"])
    serving.until("it listens", lambda: (host.settings.run_dir / "listener").is_socket())
    time.sleep(0.5)
    return serving


def send_container(stack: ExitStack, host: Host, name: str, folder: Path) -> None:
    pid, listener = stack.enter_context(container(stack.enter_context(new_cgroup(name))))
    send(host, name, pid, folder, [listener])


def hold(stack: ExitStack, pid: int) -> None:
    time.sleep(3)  # names that were looked up a moment ago have been seen to stay
    forget_names()
    stack.enter_context(running([sys.executable, "-c", HOLDS_FOR_LONG, f"/proc/{pid}", "0"]))


def assert_attached(serving: Program, name: str, is_control: bool) -> None:
    """In a control it is not, unless the folder that is held was looked up again meanwhile: nothing is shown then."""
    if not is_control:
        serving.says(f"{name}: attached")
        return
    time.sleep(10)
    if name in serving.said:
        pytest.skip("somebody has looked the names up again: the control shows nothing this time")


@pytest.mark.parametrize("defence", ["", "own descriptors"])
def test_containers_start_while_the_folder_of_graft_listen_is_held(host: Host, tmp_path: Path, defence: str) -> None:
    folder = bundle(tmp_path / "bundle")
    serving = serving_without(host, defence)
    with ExitStack() as stack:
        send_container(stack, host, "first", folder)
        serving.says("first: attached")
        hold(stack, serving.process.pid)
        send_container(stack, host, "other", folder)
        assert_attached(serving, "other", bool(defence))


@pytest.mark.parametrize("defence", ["", "found apart"])
def test_a_container_that_shares_a_user_namespace_keeps_no_other_one_from_starting(
    host: Host, tmp_path: Path, defence: str
) -> None:
    """By the folder of the process whose user namespace it is to join: of another container of its pod."""
    with subprocess.Popen(["sleep", "300"]) as process, ExitStack() as stack:
        stack.callback(process.kill)
        path = f"/proc/{process.pid}/ns/user"
        joins = bundle(tmp_path / "joins", linux={"namespaces": [{"type": "user", "path": path}]})
        folder = bundle(tmp_path / "bundle")
        serving = serving_without(host, defence)
        hold(stack, process.pid)
        send_container(stack, host, "joins", joins)
        send_container(stack, host, "other", folder)
        assert_attached(serving, "other", bool(defence))
        if not defence:
            serving.says("joins: refused, and ended: somebody holds a directory")


ASKS_ABOUT_A_LISTENER = """
import os, sys
from graft.kernel import seccomp
from graft.kernel.seccomp_filter import swap_filter
listener, _ = seccomp.install_listener(swap_filter())
print("ready", flush=True)
sys.stdin.readline()
assert not {asked}(0)
print({asked}(listener), flush=True)
"""
BY_ITS_NAME = "(lambda fd: 'seccomp notify' in os.readlink(f'/proc/self/fd/{fd}'))"


@pytest.mark.parametrize("asked", ["seccomp.is_listener", BY_ITS_NAME], ids=["", "by its name"])
def test_what_is_a_listener_is_known_while_the_own_folder_is_held(asked: str) -> None:
    """A container's shim asks for each process that its engine starts there."""
    if asked != BY_ITS_NAME:
        assert _said_while_held(asked) == "True\n"
    elif all(_said_while_held(asked) for _ in range(5)):
        pytest.skip("somebody has looked the names up again, each time: the control shows nothing")


def _said_while_held(asked: str) -> str:
    """What a process says about a listener and what is none, while another one holds its folder in /proc."""
    code = ASKS_ABOUT_A_LISTENER.replace("{asked}", asked)
    with running([sys.executable, "-c", code]) as process, ExitStack() as stack:
        hold(stack, process.pid)
        return _said_within(process, 4)[0]


def _said_within(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """Tell it to go on; what it says."""
    try:
        return process.communicate("\n", timeout=seconds * PATIENCE)
    except subprocess.TimeoutExpired:
        return "", ""
