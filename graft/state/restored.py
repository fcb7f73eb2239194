"""Whether what is saved was restored into this data plane; if not, has it restored.

The first command after a boot may be any. It starts `graft.commands.up` as a process, because restoring is made of
commands, which are above this package.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from graft.errors import KernelError
from graft.kernel.file_lock import locked_file
from graft.model.settings import Settings
from graft.state import records

MODULE = "graft.commands.up"
_LOCK_SECONDS = 120.0


def _marker(settings: Settings) -> Path:
    """Goes with the data plane, and takes no space: /run may be full, as a container can make it."""
    return settings.pin_dir / "restored"


def is_restored(settings: Settings) -> bool:
    """Whether that was done, or tried."""
    return _marker(settings).exists()


def set_restored(settings: Settings) -> None:
    """Note that it was, by a second name of a map's pin. Raises KernelError."""
    try:
        os.link(settings.pin_dir / "settings", _marker(settings))
    except (FileExistsError, FileNotFoundError):  # known, or the data plane is gone again
        return
    except OSError as error:
        raise KernelError(f"cannot note in {settings.pin_dir} what was restored: {error.strerror}") from error


@contextlib.contextmanager
def only_one(settings: Settings) -> Iterator[None]:
    """Wait until nobody else restores. Raises KernelError if that takes too long."""
    settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked_file(settings.run_dir / "restore.lock", _LOCK_SECONDS):
        yield


def ensure_restored(settings: Settings) -> None:
    """Restore what is saved, if this data plane is new, and put aside the records of one that is gone. What goes wrong
    is printed: no command fails for it.
    """
    if is_restored(settings):
        return
    saved = settings.state_dir / "saved"
    is_any_saved = saved.exists() or (settings.state_dir / "saved.old").exists()  # as Store.exists (graft.saved)
    if not is_any_saved and not any(records.folder_of(settings).glob("*.json")):
        return
    subprocess.run(
        [sys.executable, "-P", "-m", MODULE],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **settings.environment},
        check=False,
    )
