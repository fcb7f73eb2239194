"""The whole of what is saved as YAML, and back."""

from __future__ import annotations

from dataclasses import replace

import yaml

from graft.policy.document import format_path, read_document
from graft.policy.model import PolicyError
from graft.saved.model import SavedState
from graft.saved.values import read_state, state_value

MAX_BYTES = 64 << 20
_MAX_VALUES = 2_000_000
_HEAD = "# What `graft export` wrote: `graft import` puts it in the place of all that is saved (docs/operations.md).\n"


def export_text(state: SavedState) -> str:
    """The text of ``state``."""
    return _HEAD + yaml.safe_dump(state_value(state), sort_keys=False, allow_unicode=False, width=100)


def import_text(text: str, source: str) -> SavedState:
    """The state in ``text``; ``source`` is what errors call it. Raises PolicyError with every problem and its line."""
    document = read_document(text, MAX_BYTES, _MAX_VALUES)
    state = None
    if document.value is not None or not document.problems:
        state = read_state(document)
    if state is None:
        problems = sorted(set(document.problems), key=lambda one: (one.line or 0, one.field, one.message))
        whole = (replace(one, field="the file") if one.field == format_path(()) else one for one in problems)
        raise PolicyError(source, whole)
    return state
