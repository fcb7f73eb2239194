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

from graft.kernel.atomic_file import write_atomically
from graft.kernel.file_lock import locked_file
from graft.model.settings import Settings

MODULE = "graft.commands.up"
_LOCK_SECONDS = 120.0


def _marker(settings: Settings) -> bytes:
    """What tells this data plane from one before it: the pin of a map, which was made with it."""
    found = (settings.pin_dir / "settings").stat()
    return f"{found.st_dev} {found.st_ino} {found.st_mtime_ns}\n".encode()


def is_restored(settings: Settings) -> bool:
    """Whether that was done, or tried."""
    with contextlib.suppress(OSError):
        return (settings.run_dir / "restored").read_bytes() == _marker(settings)
    return False


def set_restored(settings: Settings) -> None:
    """Note that it was."""
    with contextlib.suppress(OSError):
        write_atomically(settings.run_dir / "restored", _marker(settings))


@contextlib.contextmanager
def only_one(settings: Settings) -> Iterator[None]:
    """Wait until nobody else restores. Raises KernelError if that takes too long."""
    settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked_file(settings.run_dir / "restore.lock", _LOCK_SECONDS):
        yield


def ensure_restored(settings: Settings) -> None:
    """Restore what is saved, if this data plane is new. What goes wrong is printed: no command fails for it."""
    if not (settings.state_dir / "saved").exists() or is_restored(settings):
        return
    subprocess.run(
        [sys.executable, "-P", "-m", MODULE],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **settings.environment},
        check=False,
    )
