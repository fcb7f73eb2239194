"""Engines with the configuration that `graft runtime install` writes: `--runtime graft` works, and later no more."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from graft.model.endpoint import parse_endpoint
from tests.support.engines import Engine, leftovers, runtime_script
from tests.support.engines import docker as started_docker
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = pytest.mark.e2e


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="graft-install-"))  # short: a socket's path has 107 bytes
    yield path
    shutil.rmtree(path, ignore_errors=True)


def program_over(host: Host, folder: Path, runtime: str) -> Path:
    """A program called graft-runtime, over ``runtime``, for this host's Graft."""
    place = folder / "bin"
    place.mkdir()
    return runtime_script(host, place, runtime).rename(place / "graft-runtime")


def answer_of_a_container(host: Host, engine: Engine) -> str:
    """What a server in a container with `--runtime graft` says to a client of the host's."""
    port = host.port()
    with host.installation.transaction() as change:
        change.endpoints.add(parse_endpoint("web", f"0.0.0.0:{port}", open_=True))
    flags = ["-e", "GRAFT_CONV_PAIRS=0.0.0.0:80=web"]
    runtime = ["--runtime", "graft"] if engine.name == "docker" else []  # podman's is a flag of the whole command
    engine.started("web", [*runtime, *flags], "nc", "-ll", "-p", "80", "-e", "echo", "hello")
    until("the port", lambda: host.netns.listens(port))
    with host.client.connected(HOST4, port) as sock:
        said = sock.makefile().readline().strip()
    engine.remove("web")
    until("nothing is left", lambda: not leftovers(host))
    return said


def test_dockerd_has_the_runtime_after_a_reload_and_no_more_after_another(
    host: Host, folder: Path, container_root: Path
) -> None:
    config = folder / "daemon.json"
    config.write_text(
        before := '{\n  "debug": false,\n  "runtimes": {\n    "other": {"path": "/usr/bin/runc"}\n  }\n}\n'
    )
    program = program_over(host, folder, "runc")
    with started_docker(host, folder, container_root, config) as engine:

        def runtimes() -> str:
            return engine("info", "--format", "{{json .Runtimes}}").stdout

        def reload() -> None:
            os.kill(int((folder / "pid").read_text()), signal.SIGHUP)

        assert "graft" not in runtimes()
        said = host.graft("runtime", "install", "docker", "--config", config, "--program", program).stdout
        assert "systemctl reload docker" in said
        reload()
        until("dockerd has the runtime", lambda: str(program) in runtimes())
        assert answer_of_a_container(host, engine) == "hello"
        assert "already" in host.graft("runtime", "install", "docker", "--config", config, "--program", program).stdout
        host.graft("runtime", "uninstall", "docker", "--config", config)
        assert config.read_text() == before
        reload()
        until("dockerd has it no more", lambda: "graft" not in runtimes())


def test_podman_finds_the_runtime_by_its_name_and_no_more_afterwards(host: Host, podman: Engine, folder: Path) -> None:
    config = Path(podman.environment["CONTAINERS_CONF"])
    before = config.read_text()
    program = program_over(host, folder, "crun")
    by_name = replace(podman, runtime=("--runtime", "graft"))
    changing: list[Word] = [GRAFT, "runtime", "install", "podman", "--config", config, "--program", program]
    environment = {**host.environment, **podman.environment}
    assert "graft" in by_name("info", status=125).stderr
    done = run(changing, environment=environment, status=0).stdout
    assert "checked by podman --runtime graft info" in done
    try:
        assert answer_of_a_container(host, by_name) == "hello"
    finally:
        run([GRAFT, "runtime", "uninstall", "podman", "--config", config], environment=environment, status=0)
    assert config.read_text() == before
    assert "graft" in by_name("info", status=125).stderr


def test_what_podman_cannot_use_is_put_back(host: Host, podman: Engine, folder: Path) -> None:
    config = folder / "containers.conf"
    environment = {**host.environment, **podman.environment}
    words: list[Word] = ["--config", config, "--program", program_over(host, folder, "crun")]
    config.write_text(before := '[containers]\npids_limit = "many"\n')
    refused = run([GRAFT, "runtime", "install", "podman", *words], environment=environment, status=1)
    assert f"graft: {config} is put back as it was: podman refuses it" in refused.stderr
    assert config.read_text() == before


def test_this_containerd_would_forget_the_rest_so_the_operator_is_told_what_to_write(host: Host, folder: Path) -> None:
    """1.6 replaces a whole section by that of a file that is imported. Once Debian has 2.x, this test will say so."""
    config = folder / "config.toml"
    config.write_text(f'version = 2\nimports = ["{folder}/conf.d/*.toml"]\n')
    words: list[Word] = [
        "runtime",
        "install",
        "containerd",
        "--config",
        config,
        "--program",
        program_over(host, folder, "runc"),
    ]
    refused = host.graft(*words, status=3)
    assert "would forget the rest: write this into it" in refused.stderr
    assert not list((folder / "conf.d").iterdir())
    with config.open("a") as file:
        file.write("\n".join(refused.stderr.splitlines()[1:]))
    dump = run(["containerd", "--config", config, "config", "dump"], status=0).stdout
    assert "runtimes.graft]" in dump and "runtimes.runc]" in dump
    assert "has the runtime graft already" in host.graft(*words).stdout
