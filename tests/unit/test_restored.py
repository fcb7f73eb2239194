"""Whether a data plane was restored into is noted beside its maps, and goes with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.errors import KernelError
from graft.model.settings import Settings
from graft.state import restored


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings.from_environment({"GRAFT_PIN_DIR": str(tmp_path / "pins"), "GRAFT_RUN_DIR": str(tmp_path / "run")})
    made.pin_dir.mkdir()
    (made.pin_dir / "settings").touch()
    return made


def test_it_is_noted_once_and_nothing_is_written_elsewhere(settings: Settings) -> None:
    assert not restored.is_restored(settings)
    for _ in range(2):
        restored.set_restored(settings)
        assert restored.is_restored(settings)
    assert not settings.run_dir.exists()


def test_a_data_plane_that_is_gone_needs_no_note(settings: Settings) -> None:
    (settings.pin_dir / "settings").unlink()
    restored.set_restored(settings)
    assert not restored.is_restored(settings)


def test_a_note_that_cannot_be_made_is_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("os.link", full)
    with pytest.raises(KernelError, match="Cannot allocate memory"):
        restored.set_restored(settings)
