"""What a forty-fourth reading found in what is saved: a container got the policy of the one whose name it had taken, a
passing error took what is saved away, and one that was free was said not to run, or to get a policy that it does not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.saved.store import Store
from tests.e2e.conftest import _docker, _podman, container_root, docker, podman
from tests.hostile.test_fortieth_reading_records import graft
from tests.hostile.test_forty_first_reading_saved import policies
from tests.hostile.test_thirty_eighth_reading_engines import SLEEP, alone, found, may_bind, plain, saving
from tests.support.engines import Engine
from tests.support.installation import Host

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["_docker", "_podman", "container_root", "docker", "found", "plain", "podman", "saving"]


# ---- a container that takes the name of another one that is saved ------------------------------------


def take_name(host: Host, engine: Engine, folder: Path) -> None:
    """web-new, which is denied all, becomes web, which was free and is gone. Nobody watches."""
    for name, policy in zip(("web", "web-new"), policies(folder, "free", "strict"), strict=True):
        engine.started(name, [], *SLEEP, network="host")
        host.graft("attach", "--cgroup", f"podman:{name}", "--policy", policy)
    alone(host)
    engine.remove("web")
    engine("rename", "web-new", "web")


@pytest.mark.parametrize("without", ["", "places of others"], ids=["", "control"])
@pytest.mark.parametrize("strangers", [0, 1], ids=["", "beside a stranger"])
def test_one_keeps_its_policy_when_it_has_the_name_of_another_one_and_starts_again(
    saving: Host, plain: Engine, tmp_path: Path, strangers: int, without: str
) -> None:
    take_name(saving, plain, tmp_path)
    if strangers:
        plain.started("other", [], *SLEEP, network="host")
        graft(saving, without, "up")  # it is attached: nothing is to be done but to note where it is
        alone(saving)
    plain("restart", "-t", "0", "web")
    done = graft(saving, without, "up")
    alone(saving)
    assert may_bind(saving, plain, "web") is bool(without)
    assert (
        "podman:web waits: the container that has its name now is saved as podman:web-new" in done.stderr
    ) is not bool(without)
    export = tmp_path / "export.yaml"
    export.write_text(saving.graft("export").stdout)
    graft(saving, without, "import", export, status=4 if without else 0)
    plain.remove("web", *["other"] * strangers)


@pytest.mark.parametrize("without", ["", "places of others"], ids=["", "control"])
def test_nor_is_it_noted_to_be_the_other_one_by_a_policy_for_now(
    saving: Host, plain: Engine, tmp_path: Path, without: str
) -> None:
    take_name(saving, plain, tmp_path)
    graft(saving, without, "attach", "--no-save", "--cgroup", "podman:web", "--deny")
    alone(saving)
    places = {one.last.cgroup for one in Store(saving.settings).read()[0].attachments}
    assert len(places) == (1 if without else 2)
    plain.remove("web")


def test_one_that_is_made_again_by_that_name_has_what_is_saved(saving: Host, plain: Engine, tmp_path: Path) -> None:
    take_name(saving, plain, tmp_path)
    saving.graft("up")
    alone(saving)
    plain.remove("web")
    for name in ("web", "web-new"):
        plain.started(name, [], *SLEEP, network="host")
    assert saving.graft("up").stderr == ""
    alone(saving)
    assert may_bind(saving, plain, "web") and not may_bind(saving, plain, "web-new")
    plain.remove("web", "web-new")
