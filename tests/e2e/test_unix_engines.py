"""A unix socket that a program in a container of podman or docker binds itself: it is bound at the host's path."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engines import Engine
from tests.support.installation import Host
from tests.support.shell import run
from tests.support.wait import until

pytestmark = pytest.mark.e2e

CONFIGURATION = """
user root root; daemon off; pid /tmp/pid; error_log stderr warn;
events {}
http {
  access_log off;
  client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fcgi;
  uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
  server { listen unix:/tmp/own.sock; location / { return 200 'nginx in a container\\n'; } }
}
"""


@pytest.fixture
def folder(root: None) -> Iterator[Path]:
    """A folder with a path that is short enough."""
    with tempfile.TemporaryDirectory(prefix="gu-") as made:
        yield Path(made)


def policy(host: Host, path: Path, name: str = "own") -> str:
    """A policy by which /tmp/own.sock of a container is ``path`` of the host."""
    policies = host.settings.state_dir / "policies"
    policies.mkdir(parents=True, exist_ok=True)
    (policies / f"{name}.yaml").write_text(
        f"name: {name}\nopen: true\nendpoints: {{{name}: {{address: 'unix:{path}', mode: '0600'}}}}\n"
        f"ingress: [{{bind: 'unix:/tmp/own.sock', endpoint: {name}}}]\n"
    )
    return f"GRAFT_POLICY={name}"


def answer(path: Path) -> str:
    """What nginx answers there; nothing as long as it does not listen."""
    return run(["curl", "-sS", "--max-time", "10", "--unix-socket", path, "http://app/"]).stdout


@pytest.mark.parametrize("name", ["podman", "docker"])
def test_nginx_in_a_container_binds_a_socket_of_the_host(
    host: Host, name: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    engine: Engine = request.getfixturevalue(name)
    path, configuration = folder / "app.sock", folder / "nginx.conf"
    configuration.write_text(CONFIGURATION)
    flags = ["-e", policy(host, path), "-v", f"{configuration}:/etc/own.conf:ro"]
    engine.started(
        "own", [*flags, *(["--runtime", "graft"] if name == "docker" else [])], "nginx", "-c", "/etc/own.conf"
    )
    until("the socket is there", path.is_socket)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    until("nginx listens", lambda: answer(path) == "nginx in a container\n")
    # nginx gives its socket a mode by its path: that names nothing in the container, and nothing of the host's changes.
    assert engine("exec", "own", "ls", "/tmp").stdout.split().count("own.sock") == 0
    engine.remove("own")
    until("the socket is gone", lambda: not path.exists())
