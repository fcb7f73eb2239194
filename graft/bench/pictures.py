"""Which pictures can be drawn: known without importing matplotlib, which takes a second."""

from __future__ import annotations

import importlib.util

SUFFIXES = (".png", ".svg", ".pdf")


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None
