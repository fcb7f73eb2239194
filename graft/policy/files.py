"""The text of a policy file."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from graft.errors import NotFoundError, UsageError
from graft.model.address import shown
from graft.policy.limits import MAX_BYTES


def read_policy(path: Path, regular_only: bool = False) -> str:
    """The text of a policy file. Raises NotFoundError or UsageError, also for what is too big or not UTF-8.

    ``regular_only``: refuse pipes, devices, and a file that another process could make the caller wait for. For a path
    that an image may have named.
    """
    try:
        with _open_regular(path) if regular_only else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise NotFoundError(f"policy: {path} not found") from None
    except OSError as error:
        raise UsageError(f"policy: cannot read {path}: {error.strerror}") from error
    except ValueError:
        raise UsageError(f"policy: {shown(str(path))} is not a path") from None
    return decode_policy(data, str(path))


def _open_regular(path: Path) -> BinaryIO:
    """Open ``path`` for reading, but only once it is known to be a regular file: opening a device can have effects.

    An open that breaks a lease (fcntl(2), F_SETLEASE) would wait for the holder, for 45 seconds by default:
    O_NONBLOCK makes it fail at once.
    """
    checked = os.open(path, os.O_PATH)
    try:
        if not stat.S_ISREG(os.fstat(checked).st_mode):
            raise UsageError(f"policy: {path} is not a regular file")
        return open(os.open(f"/proc/self/fd/{checked}", os.O_RDONLY | os.O_NONBLOCK), "rb")
    except BlockingIOError:
        raise UsageError(f"policy: {path} is leased by another process") from None
    finally:
        os.close(checked)


def decode_policy(data: bytes, source: str) -> str:
    """The text in ``data``, read from ``source``. Raises UsageError for what is too big or not UTF-8."""
    if len(data) > MAX_BYTES:
        raise UsageError(f"policy: {source} is too big", f"at most {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"policy: {source} is not UTF-8 text") from None
