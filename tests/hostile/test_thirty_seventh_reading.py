"""What a thirty-seventh reading found, where the file system of /run is full: a container that was to be attached anew
after its data plane was lost had no hooks at all, and what an import could not change back was granted further.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.conftest import graft_without
from tests.hostile.test_thirty_second_reading import Small, small
from tests.support.cgroups import new_cgroup
from tests.support.namespaces import CLIENT4
from tests.support.puppet import puppet
from tests.support.shell import Word, run
from tests.support.small_run import empty, fill

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["small"]

DENIES = "name: nothing\ndefault: deny\n"


@pytest.mark.parametrize("without", ["", "hooks stay"], ids=["", "control"])
@pytest.mark.parametrize("how", ["attach", "up"])
def test_a_container_whose_data_plane_is_lost_stays_confined(
    small: Small, tmp_path: Path, how: str, without: str
) -> None:
    host, others = small
    used = host.saving if how == "up" else host
    policy = tmp_path / "p.yaml"
    policy.write_text(DENIES)
    with new_cgroup("box") as box, host.client.listener(CLIENT4) as listener, puppet(box, host.netns.path) as one:
        where = CLIENT4, listener.getsockname()[1]
        attach: list[Word] = [
            "attach",
            *(["--no-save"] if how == "attach" else []),
            "--cgroup",
            box,
            "--policy",
            policy,
        ]
        used.graft(*attach)
        run(["rm", "-rf", host.settings.pin_dir], status=0)  # as if it were unmounted
        if how == "attach":
            used.graft("up")
        assert one.connect(*where) == "EACCES"
        fill(others)
        run([*graft_without(without), *(["up"] if how == "up" else attach)], environment=used.environment)
        assert one.connect(*where) == ("ok" if without else "EACCES")
        empty(others)
        if not without:
            used.graft("up" if how == "up" else "ps")
            used.graft(*attach, status=None)
            assert [one.cgroup for one in used.installation.containers.listing()] == [str(box)]
            assert one.connect(*where) == "EACCES"
