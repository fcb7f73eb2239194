"""What a fifth reading found: a peer without a port, and a policy that an image brings with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from graft.errors import ConflictError, NotFoundError, RefusedError
from graft.model.settings import Settings
from graft.oci import request
from graft.oci.listener import ListenerServer
from graft.oci.options import RuntimeOptions
from graft.oci.request import Request, Source
from graft.oci.state import State
from tests.hostile.conftest import Confine, Without
from tests.hostile.test_fourth_reading import DOCKERS, PODMANS, strays
from tests.support.installation import Host
from tests.support.shell import Word, run

pytestmark = pytest.mark.e2e

# ---- a datagram socket may be connected to port 0: it is connected all the same --------------------------------------


def test_a_socket_connected_to_port_0_sends_to_no_destination_that_lost_its_rule(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    before, after = strays(host, confine, tmp_path, port=0)
    assert before is not None
    assert after is None


def test_control_where_a_peer_without_a_port_is_none_it_does(
    without: Without, confine: Confine, tmp_path: Path
) -> None:
    assert None not in strays(without("port 0"), confine, tmp_path, port=0)


# ---- an image names, by an annotation that podman copies, a policy file of its own ----------------------------------


def choose(folder: Path, cgroup: str, options: RuntimeOptions) -> str:
    """The policy in a file that the engine has unpacked from the image, whose layer's digest is its folder's name."""
    file = folder / "overlay/4d5e/diff/policy.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("name: its-own\nopen: true\nendpoints: {ssh: '0.0.0.0:22'}\n")
    config: dict[str, Any] = {"annotations": {"graft.policy": str(file)}, "linux": {"cgroupsPath": cgroup}}
    asked = request.requested(config)
    assert asked == Request(Source.ANNOTATION, str(file))
    return request.choose_policy(Settings.from_environment({}), asked, config, options, {}).name


@pytest.mark.parametrize("cgroup", PODMANS)
def test_an_image_names_no_policy_file_of_its_own(tmp_path: Path, cgroup: str) -> None:
    with pytest.raises(RefusedError, match="not a path"):
        choose(tmp_path, cgroup, RuntimeOptions())


@pytest.mark.parametrize(("cgroup", "trust"), [(DOCKERS, None), (PODMANS[0], True)])
def test_control_an_annotation_of_the_operators_may_be_a_path(tmp_path: Path, cgroup: str, trust: bool | None) -> None:
    assert choose(tmp_path, cgroup, RuntimeOptions(trust_annotations=trust)) == "its-own"


@pytest.mark.parametrize("variable", ["GRAFT_POLICY=sealed", "GRAFT_CONV_PAIRS=0.0.0.0:80=web"])
@pytest.mark.parametrize("cgroup", [PODMANS[0], DOCKERS])
def test_an_image_does_not_replace_the_policy_that_the_operators_environment_names(
    tmp_path: Path, variable: str, cgroup: str
) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies/wide.yaml").write_text("name: wide\nopen: true\n")
    settings = Settings.from_environment({"GRAFT_STATE_DIR": str(tmp_path)})
    config: dict[str, Any] = {"annotations": {"graft.policy": "wide"}, "linux": {"cgroupsPath": cgroup}}
    config["process"] = {"env": [variable]}
    asked = request.requested(config)
    assert asked == Request(Source.ANNOTATION, "wide")
    if cgroup == DOCKERS:  # the operator's own annotation
        assert request.choose_policy(settings, asked, config, RuntimeOptions(), {}).name == "wide"
        return
    with pytest.raises(ConflictError, match="differ"):
        request.choose_policy(settings, asked, config, RuntimeOptions(), {})


# ---- a checkpoint of a container starts again as any runtime would start it -----------------------------------------


@pytest.mark.parametrize(("command", "status"), [("restore", 1), ("start", 0)])
def test_no_checkpoint_is_restored_without_the_policy_that_it_asks_for(
    host: Host, tmp_path: Path, command: str, status: int
) -> None:
    (tmp_path / "config.json").write_text('{"annotations": {"graft.policy": "any"}}')
    environment = {**host.environment, "GRAFT_RUNTIME": "true"}
    words: list[Word] = [
        sys.executable,
        "-m",
        "graft.oci.main",
        command,
        "--image-path",
        tmp_path,
        "--bundle",
        tmp_path,
        "one",
    ]
    done = run(words, environment=environment, status=status)
    assert ("cannot be restored" in done.stderr) == (command == "restore")


# ---- what the runtime says of a container whose configuration is not seen -------------------------------------------


def test_no_container_is_served_by_annotations_alone(tmp_path: Path) -> None:
    """Nothing says then that they are not the image's, or that it has no CAP_NET_ADMIN."""
    server = ListenerServer(Settings.from_environment({}), RuntimeOptions(), Path("/"), print)
    with pytest.raises(NotFoundError, match=r"config\.json not found"):
        server._plan(State("one", os.getpid(), str(tmp_path), {"graft.policy": "any"}))
