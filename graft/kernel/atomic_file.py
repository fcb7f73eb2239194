"""Files that other processes read while they are replaced.

Sources: rename(2), renameat2(2) with linux/fs.h.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from graft.kernel.syscalls import syscall

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True, slots=True)
class PreparedFile:
    """A file that is written, and not yet at its place: what can fail for want of space has been done."""

    temporary: Path
    path: Path
    durable: bool

    def commit(self) -> None:
        """Put it in its place, in one step. Raises OSError: then what was there still is."""
        try:
            self.temporary.rename(self.path)
        except BaseException:
            self.discard()
            raise
        if self.durable:
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove it instead."""
        self.temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk (fsync(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def prepare_file(
    path: Path, data: bytes, mode: int = 0o600, owner: tuple[int, int] | None = None, durable: bool = False
) -> PreparedFile:
    """Write what is to be at ``path``, beside it. Raises OSError: then no temporary file is left.

    ``owner`` is (uid, gid), None for the caller's own. ``durable``: on the disk, before the rename and after it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # left by a killed process that had the same number
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            if owner is not None:
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            if durable:
                file.flush()
                os.fsync(fd)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return PreparedFile(temporary, path, durable)


def write_atomically(path: Path, data: bytes, mode: int = 0o600, owner: tuple[int, int] | None = None) -> None:
    """Make a file at ``path``, or replace the one there, in one step: a reader gets the old content or the new one.

    ``owner`` is (uid, gid), None for the caller's own. Raises OSError: then ``path`` is unchanged, and no temporary
    file is left.
    """
    prepare_file(path, data, mode, owner).commit()


def exchange(new: Path, path: Path) -> None:
    """Put the folder ``new`` in the place of the folder ``path``, and that in its place, in one step.

    A file system that cannot do it in one step (some overlays) does it in three. Raises OSError.
    """
    try:
        syscall("renameat2", _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EXDEV, errno.ENOSYS):
            raise
        aside = path.with_name(f"{path.name}.old")
        path.rename(aside)
        new.rename(path)
        aside.rename(new)
