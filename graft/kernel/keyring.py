"""Session keyrings (keyctl(2), session-keyring(7)): a process that has one may use its keys, whatever its user id."""

from __future__ import annotations

import errno

from graft.kernel.syscalls import syscall

_JOIN_SESSION_KEYRING = 1


def leave_session_keyring() -> None:
    """Give the calling process a new, empty session keyring. Raises OSError (EDQUOT, ENOMEM)."""
    try:
        syscall("keyctl", _JOIN_SESSION_KEYRING, None)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a kernel without keys (CONFIG_KEYS)
            raise
