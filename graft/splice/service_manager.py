"""graftd as a unit of systemd's (docs/operations.md): where that is enabled, nobody else starts graftd, and systemd is
its keeper.

Source: systemctl(1).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from graft.errors import KernelError
from graft.model.settings import Settings
from graft.state import engines
from graft.state.engines import EngineAnswer

UNIT = "graftd.service"
_BEFORE = "graft.service"
"""It restores what is saved, and has to be done before systemd starts ``UNIT``."""
_KEPT = ("graft-listen.service", UNIT)  # systemd starts them again where they are killed
_SYSTEMD = Path("/run/systemd/system")  # is there where systemd runs: sd_booted(3)
_SECONDS = 90.0


def is_in_charge(settings: Settings) -> bool:
    """Whether systemd starts graftd."""
    return _may_be_asked(settings) and _answer("is-enabled", UNIT) == "enabled"


def start() -> None:
    """Have systemd start graftd, and wait until it answers. Raises KernelError."""
    if _answer("is-active", _BEFORE) == "activating":  # this process may be what it waits for
        raise KernelError(f"{UNIT} starts when {_BEFORE} is done", "it is tried again by itself")
    answer = _systemctl("start", UNIT)
    if answer is None or answer.status != 0:
        raise KernelError(f"systemd does not start {UNIT}", f"systemctl status {UNIT}")


def stop(settings: Settings) -> None:
    """Have systemd stop what it has started of Graft's, and would else start again."""
    if not _may_be_asked(settings):
        return
    for unit in _KEPT:
        if _answer("is-active", unit) in ("active", "activating", "reloading"):
            _systemctl("stop", unit)


def _may_be_asked(settings: Settings) -> bool:
    """The unit is for the usual installation, not for one with folders of its own."""
    return settings.run_dir == Settings.from_environment({}).run_dir and _SYSTEMD.is_dir()


def _answer(question: str, unit: str) -> str:
    answer = _systemctl(question, unit)
    return answer.out.strip() if answer else ""


def _systemctl(verb: str, unit: str) -> EngineAnswer | None:
    """None where it does not answer in time."""
    with contextlib.suppress(KernelError):
        return engines.run(["systemctl", "--no-ask-password", verb, unit], _SECONDS)
    return None
