"""What the seventeenth reading found about `graft listen`, and a container that has no cgroup of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import _podman, container_root, plain_engine, podman
from tests.hostile.conftest import graft_without
from tests.hostile.test_listener import can_connect
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.engines import Engine
from tests.support.installation import Host

__all__ = ["_podman", "container_root", "plain_engine", "podman"]
pytestmark = pytest.mark.e2e


CONNECTS = """
import socket, sys
for port in sys.stdin:
    with socket.socket() as one:
        try:
            one.connect(("127.0.0.1", int(port)))
            print("works", flush=True)
        except OSError as error:
            print(error.strerror, flush=True)
"""


def operators_connect(host: Host, engine: Engine, folder: Path, without: str) -> tuple[str, str]:
    """What a process of the operator's session meets while a container runs that was started there without a cgroup,
    and what `graft listen` says of the container.
    """
    policies = host.settings.state_dir / "policies"
    policies.mkdir(parents=True, exist_ok=True)
    (policies / "web.yaml").write_text("name: web\nopen: true\ndefault: {bind: deny, connect: deny}\n")
    profile = folder / "profile.json"
    profile.write_text(host.graft("seccomp-profile").stdout)
    serving = host.start_command([*graft_without(without), "listen"])
    serving.until("it listens", lambda: can_connect(host.settings.run_dir / "listener"))
    with ExitStack() as stack:
        stack.callback(serving.stop)
        session = stack.enter_context(new_cgroup("session"))
        listener = stack.enter_context(host.netns.listener("127.0.0.1"))
        command = [*in_cgroup(session), *host.netns.command(sys.executable, "-c", CONNECTS)]
        shell = host.start_command(command, talk=True)
        words = ["run", "--rm", "--cgroups=disabled", "--network", "none", "--security-opt", f"seccomp={profile}"]
        words += ["-e", "GRAFT_POLICY=web", *engine.run_flags, *engine.image, "sleep", "60"]
        run = subprocess.Popen([*in_cgroup(session), *engine.command(*words)], env={**os.environ, **engine.environment})
        stack.callback(run.wait)
        stack.callback(lambda: engine.remove_all())
        serving.until("a container", lambda: "attached" in serving.said or "refused" in serving.said)
        shell.tell(f"{listener.getsockname()[1]}\n")
        shell.until("an answer", lambda: shell.said)
        met, said = shell.said.strip(), serving.said
        stack.callback(lambda: host.remove_at(session))
    return met, said


@pytest.mark.parametrize("plain_engine", ["podman"], indirect=True)
def test_the_operators_session_is_no_container(host: Host, plain_engine: Engine, tmp_path: Path) -> None:
    met, said = operators_connect(host, plain_engine, tmp_path, "")
    assert met == "works"
    assert "refused" in said and "shares its engine's" in said


@pytest.mark.parametrize("plain_engine", ["podman"], indirect=True)
def test_control_where_any_cgroup_will_do_it_is(host: Host, plain_engine: Engine, tmp_path: Path) -> None:
    met, said = operators_connect(host, plain_engine, tmp_path, "engines' ids")
    assert met == "Permission denied" and "attached" in said
