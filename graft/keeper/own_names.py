"""What graftd looks up in its own folder in /proc, kept in the kernel's cache from before anybody can see graftd.

Every user may list /proc/PID and its folder task, and so hold them: whoever looks up there what is not in the cache
waits for him, in the kernel, where nothing ends it. The folder fd itself only root may list. A name stays in the cache
while a descriptor of it is open, also when another program is executed: the process stays the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

_NAMES = ("fd", "mountinfo", "ns/pid", "task/{pid}/stat", "task/{pid}/schedstat")
"""Those of its keeper's socket and others', of cgroup v2, of the check that it runs among the host's processes, of the
watchdog, and of slow calls. (Names themselves, not what a link leads to.)
"""


def pin(inherited: int = 0) -> None:
    """Keep them in the cache until this process ends. ``inherited``: and the program that it executes, by descriptors
    from that number on.
    """
    for name in _NAMES:
        with contextlib.suppress(OSError):  # a kernel without it
            fd = os.open(f"/proc/self/{name.format(pid=os.getpid())}", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            if inherited:
                fcntl.fcntl(fd, fcntl.F_DUPFD, inherited)
                os.close(fd)
