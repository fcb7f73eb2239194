"""What a fifth reading found: a policy that an image brings with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.errors import RefusedError
from graft.model.settings import Settings
from graft.oci import request
from graft.oci.options import RuntimeOptions
from graft.oci.request import Request, Source
from tests.hostile.test_fourth_reading import DOCKERS, PODMANS

pytestmark = pytest.mark.e2e

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
