"""Session keyrings (keyctl(2), session-keyring(7)): whoever has one may use the keys in it, whatever his user id."""

from __future__ import annotations

import errno

from graft.kernel.syscalls import syscall

_JOIN_SESSION_KEYRING = 1


def leave_session_keyring() -> None:
    """Give the calling process a new session keyring, with nothing in it. Raises OSError (EDQUOT, ENOMEM)."""
    try:
        syscall("keyctl", _JOIN_SESSION_KEYRING, None)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a kernel without keys (CONFIG_KEYS)
            raise
