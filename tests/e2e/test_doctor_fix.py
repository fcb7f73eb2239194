"""`graft doctor --fix`: each thing that is wrong is named with what mends it, and is mended."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import pytest

from graft.commands import health, watcher_process
from graft.datapath.dataplane import is_up
from graft.splice import client as splice
from graft.splice import control
from tests.e2e.conftest import MakeCgroup
from tests.support.installation import Host
from tests.support.plain import plain

pytestmark = pytest.mark.e2e


@pytest.fixture
def saving(bare_host: Host) -> Iterator[Host]:
    host = bare_host.saving
    host.graft("up")
    yield host
    host.graft("down", "--force", "--forget", status=None)


def problems(host: Host) -> list[str]:
    return [one.name for one in health.ailments(host.settings)]


def mended(host: Host) -> list[str]:
    told: list[str] = []
    assert health.mend(host.settings, told.append) == []
    return told


def test_nothing_is_wrong_with_a_sound_one(saving: Host, make_cgroup: MakeCgroup) -> None:
    saving.graft("attach", "--cgroup", make_cgroup(), "-i", f"0.0.0.0:80={saving.endpoint('0.0.0.0:dynamic')}")
    assert problems(saving) == []
    assert mended(saving) == []


def test_a_folder_that_others_may_use_is_made_private(saving: Host) -> None:
    saving.settings.run_dir.chmod(0o755)
    said = saving.graft("doctor", "--json", status=1).stderr
    assert "others than root may use it (owner 0, mode 755) (graft doctor --fix, or chown root" in said
    assert ": mended" in saving.graft("doctor", "--fix", "--json").stderr
    assert stat.S_IMODE(saving.settings.run_dir.stat().st_mode) == 0o700


def test_what_others_may_have_saved_is_not_restored_by_itself(saving: Host) -> None:
    saving.graft("ep", "add", "web", "127.0.0.1:8080")
    saving.graft("down", "--force")
    saving.settings.state_dir.chmod(0o777)
    try:
        assert "look at what is there (graft export, policies)" in saving.graft("doctor", "--fix", status=1).stderr
        assert stat.S_IMODE(saving.settings.state_dir.stat().st_mode) == 0o777
        assert not is_up(saving.settings) or not saving.installation.endpoints.listing()
    finally:
        saving.settings.state_dir.chmod(0o700)


def test_graftd_and_the_watcher_are_started(saving: Host) -> None:
    with plain(saving) as container:
        container.attach("-i", f"0.0.0.0:80={saving.endpoint('0.0.0.0:dynamic')}")
        splice.stop(saving.settings)
        watcher_process.stop(saving.settings)
        assert problems(saving) == ["graftd", "watcher"]
        assert mended(saving) == [
            "graftd: containers need it, and it does not run: mended",
            "watcher: nobody watches for saved containers that start: mended",
        ]
        assert control.ask(saving.settings, {"do": "ping"}) is not None
        assert problems(saving) == []
        [one] = saving.ps()
        assert one["relay"]["serves"]


def test_what_is_saved_is_restored(saving: Host, make_cgroup: MakeCgroup) -> None:
    path = make_cgroup()
    saving.graft("ep", "add", "kept", "0.0.0.0:dynamic")
    saving.graft("attach", "--cgroup", path, "-i", "0.0.0.0:80=kept")
    saving.graft("down", "--force")
    assert problems(saving)[0] == "data plane"
    said = saving.graft("doctor", "--json", status=1).stderr
    assert "data plane: something is saved, and Graft is not up (graft doctor --fix, or graft up)" in said
    assert mended(saving) == ["data plane: something is saved, and Graft is not up: mended"]
    assert [(one["state"], one["cgroup"]) for one in saving.ps()] == [("attached", str(path))], saving.ps()


def test_what_it_cannot_mend_it_names_the_command_for(saving: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.datapath.layout.LAYOUT_VERSION", 1)
    [one] = health.ailments(saving.settings)
    assert one.name == "data plane" and one.mend is None and "graft down" in one.command
    told: list[str] = []
    assert health.mend(saving.settings, told.append) == [one] and not told
