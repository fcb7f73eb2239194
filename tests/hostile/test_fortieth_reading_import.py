"""What a fortieth reading found in `graft import`: one that was killed lost what was saved."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from graft.commands import saving as saving_commands
from graft.commands import watcher_process
from graft.model.settings import Settings
from graft.saved.model import SavedState
from graft.saved.store import Store
from graft.saved.whole import old_of
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import attached, box, reboot, saver
from tests.hostile.test_thirty_sixth_reading_saved import NARROW
from tests.support.installation import Host
from tests.support.saved import ATTACHMENT, ENDPOINT
from tests.support.shell import run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(250)]
__all__ = ["box", "saver", "write_policy"]

both = pytest.mark.parametrize("without", [False, True], ids=["", "control"])


# ---- an import that is killed where folders cannot be exchanged -------------------------------------

KILLED = """
import errno, os, signal, sys
from pathlib import Path
from graft.kernel import atomic_file
from graft_cli.main import main

def refuse(*_):
    raise OSError(errno.EINVAL, "an overlay")

def rename(path, target):
    if path.name.startswith("saved"):
        left.pop() if left else os.kill(os.getpid(), signal.SIGKILL)
    return renamed(path, target)

atomic_file.syscall, renamed, Path.rename, left = refuse, Path.rename, rename, [1] * int(sys.argv.pop(1))
main()
"""


def test_an_import_that_is_killed_between_its_renames_loses_nothing(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    file = tmp_path / "all.yaml"
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(NARROW))
    saver.graft("export", file)
    watcher_process.stop(saver.settings)
    done = run([sys.executable, "-c", KILLED, 1, "import", file], environment=saver.environment, status=None)
    assert done.returncode == -signal.SIGKILL, done
    assert not Store(saver.settings).folder.exists()
    assert saver.graft("export").stdout == file.read_text()
    reboot(saver, box)
    assert saver.graft("up").stderr == ""
    assert attached(saver, box)


@both
def test_what_is_saved_next_takes_nothing_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: bool
) -> None:
    folders = {"GRAFT_STATE_DIR": str(tmp_path / "state"), "GRAFT_RUN_DIR": str(tmp_path / "run")}
    settings = Settings.from_environment(folders)
    store = Store(settings)
    with store.locked():
        store.prepare_attachment(ATTACHMENT).commit()
        store.prepare_all(SavedState())
        store.folder.rename(old_of(store.folder))  # the first of the three, and the last that it did
    if without:
        monkeypatch.setattr(Store, "_finish_exchange", lambda self: None)
    assert store.exists and store.read() == (SavedState((), (ATTACHMENT,)), [])
    with saving_commands.endpoint(settings, ENDPOINT, True):
        pass
    monkeypatch.undo()
    with store.locked():
        assert store.read() == (SavedState((ENDPOINT,), () if without else (ATTACHMENT,)), [])
    assert not old_of(store.folder).exists()
