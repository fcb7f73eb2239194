"""Whether a command may have as many descriptors as it needs (getrlimit(2), RLIMIT_NOFILE).

With fewer it would fail in the middle of what it does, and then could not tidy up either: that takes descriptors too.
"""

from __future__ import annotations

import resource

from graft.errors import KernelError

LEAST = 64


def require_descriptors() -> None:
    """Raises KernelError where the limit is too low for any command."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < LEAST:
        raise KernelError(f"a limit of {limit} open files is too low for Graft", f"ulimit -n {LEAST}, or more")
