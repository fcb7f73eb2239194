"""Which containers without a supervisor were detached: their programs go on, with sockets that keep their tags.

`graft down` closes what containers have left (leftovers.py), by the tags, which do not say what became of a container.
The tags cannot be taken away when it is detached: that takes a descriptor of each socket, and the only one may be in a
message between two processes, or belong to one that does not lend it. So its number is kept, in a file of that name.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from graft.model.settings import Settings


def note(settings: Settings, number: int) -> None:
    """Note that a container was detached, before its rules go."""
    folder = _folder(settings)
    with contextlib.suppress(OSError):  # no room in the file system of run_dir: it is detached all the same
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / str(number)).touch(mode=0o600)


def forget(settings: Settings, number: int) -> None:
    """Forget an earlier container: its number is another one's now (of a data plane after its own)."""
    (_folder(settings) / str(number)).unlink(missing_ok=True)


def numbers(settings: Settings) -> frozenset[int]:
    """The numbers of all of them."""
    return frozenset(int(path.name) for path in _folder(settings).glob("*") if path.name.isdecimal())


def _folder(settings: Settings) -> Path:
    return settings.run_dir / "detached"
