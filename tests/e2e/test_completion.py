"""bash, zsh and fish complete names that exist, by the scripts that the Debian package has."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeCgroup, StartPuppet
from tests.support.installation import GRAFT, Host
from tests.support.shell import run
from tests.support.shells import completed

pytestmark = pytest.mark.e2e


@pytest.fixture(params=["bash", "zsh", "fish"])
def shell(request: pytest.FixtureRequest) -> str:
    assert shutil.which(request.param), f"make setup: missing {request.param}"
    return str(request.param)


@pytest.fixture
def script(shell: str, tmp_path: Path) -> Path:
    path = tmp_path / f"graft.{shell}"
    path.write_text(run([GRAFT], environment={"_GRAFT_COMPLETE": f"source_{shell}"}, status=0).stdout)
    return path


@pytest.fixture
def environment(host: Host) -> dict[str, str]:
    return {**host.environment, "PATH": f"{GRAFT.parent}:{os.environ['PATH']}"}


def test_an_endpoint_is_completed_as_an_argument_and_in_a_rule(
    host: Host, shell: str, script: Path, environment: dict[str, str]
) -> None:
    host.graft("ep", "add", "webserver", "0.0.0.0:8080")
    host.graft("ep", "add", "other", "0.0.0.0:8081")
    for line, whole in (
        ("graft ep del we", "graft ep del webserver"),
        ("graft ep show o", "graft ep show other"),
        ("graft ep set web", "graft ep set webserver"),
        ("graft ep add web", "graft ep add web"),
        ("graft run -i 0.0.0.0:80=we", "graft run -i 0.0.0.0:80=webserver"),
        ("graft run -e 10.0.0.0/8=oth", "graft run -e 10.0.0.0/8=other"),
    ):
        assert completed(shell, script, line, environment) == whole


def test_an_attached_container_is_completed(
    host: Host,
    shell: str,
    script: Path,
    environment: dict[str, str],
    make_cgroup: MakeCgroup,
    start_puppet: StartPuppet,
) -> None:
    path = make_cgroup()
    start_puppet(path)
    host.graft("ep", "add", "webserver", "0.0.0.0:8080")
    host.graft("attach", "--cgroup", path, "-i", "0.0.0.0:80=webserver")
    name = host.ps_of(path)["name"]
    for command in ("graft detach --cgroup", "graft policy show", "graft policy apply x --cgroup"):
        assert completed(shell, script, f"{command} {name[:-2]}", environment) == f"{command} {name}"


def test_a_list_is_completed_name_by_name(shell: str, script: Path, environment: dict[str, str]) -> None:
    for line, whole in (
        ("graft bench --cases swap,dock", "graft bench --cases swap,docker-proxy"),
        ("graft bench --workloads rules,cont", "graft bench --workloads rules,containers"),
    ):
        assert completed(shell, script, line, environment) == whole


def test_a_policy_is_completed_by_its_path(host: Host, shell: str, script: Path, environment: dict[str, str]) -> None:
    folder = host.settings.state_dir / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "frontend.yaml").write_text("name: frontend\n")
    line = f"graft run --policy {folder}/fro"
    assert completed(shell, script, line, environment) == f"graft run --policy {folder}/frontend.yaml"


def test_other_files_are_completed_by_the_shell(
    host: Host, shell: str, script: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "somewhere.yaml").touch()
    line = f"graft policy check {tmp_path}/somew"
    assert completed(shell, script, line, environment) == f"graft policy check {tmp_path}/somewhere.yaml"
