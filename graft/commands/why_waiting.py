"""Why saved containers wait: noted by who restores (restore.py), for `graft ps`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from graft.errors import UsageError
from graft.kernel.atomic_file import write_atomically
from graft.model import json_text
from graft.model.settings import Settings

NOT_NOTED = "the reason could not be noted: graft up tells it"
EACH = ""
"""The name, among the reasons, of the one for which all wait that have none of their own."""

_MAX_NOTES = 4 << 20


def note(settings: Settings, waiting: Mapping[str, str]) -> None:
    """Note the reason of each."""
    try:
        write_atomically(_notes(settings), json.dumps(waiting).encode())
    except OSError:  # no room: those of before do not count any more
        _notes(settings).unlink(missing_ok=True)


def noted(settings: Settings) -> dict[str, str] | None:
    """Why each container waited, when that was last tried; None where that could not be noted."""
    try:
        return json_text.text_by_name(json_text.parse(_notes(settings).read_bytes(), "waiting", _MAX_NOTES), "waiting")
    except FileNotFoundError:
        return None
    except (OSError, UsageError):
        return {}


def _notes(settings: Settings) -> Path:
    return settings.run_dir / "waiting.json"
