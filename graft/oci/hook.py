"""The commands that a runtime runs as hooks of a container. Quick to start: few imports.

python -m graft.oci.hook attach SOCKET     createRuntime: have the shim attach the container, or fail
python -m graft.oci.hook reap              poststop: remove the rules of containers that have ended
"""

from __future__ import annotations

import os
import socket
import sys

_TIMEOUT = 50.0
_MAX_BYTES = 1 << 20  # the shim's limit (graft/oci/state.py)


def attach(path: str, state: bytes) -> str:
    """Have the shim attach the container in ``state``, which the runtime gave; the error, "" for none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as shim:
        shim.settimeout(_TIMEOUT)
        try:
            shim.connect(path)
            shim.sendall(state)
            shim.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := shim.recv(65536):
                answer += chunk
        except OSError as error:
            return f"the container's supervisor does not answer: {error.strerror or error}"
    if answer == b"ok":
        return ""
    return answer.decode(errors="replace") or "the container's supervisor ended before the container was attached"


def reap() -> None:
    """Remove the rules and records of containers whose cgroup is gone, and what others have of their sockets."""
    from graft.datapath.dataplane import is_up
    from graft.model.settings import Settings
    from graft.state import leftovers, members
    from graft.state.installation import Installation

    settings = Settings.from_environment()
    if is_up(settings):
        graft = Installation(settings)
        listed = graft.containers.listing()
        gone = members.gone(listed)
        with leftovers.closed_after(graft, *(one for one in listed if one.id in gone)):
            graft.forget(gone)


def report(text: str) -> None:
    """Print a line for the operator. crun's hooks have no standard error: there it goes to that of crun itself."""
    from graft.model.printable import printable

    is_null = os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev
    try:
        with open(f"/proc/{os.getppid()}/fd/2" if is_null else 2, "a", errors="replace", closefd=is_null) as output:
            print(printable(text), file=output)
    except OSError:
        pass


def main() -> int:
    """The entry point; gives the hook's exit status."""
    if sys.argv[1:2] == ["reap"]:
        reap()
        return 0
    state = sys.stdin.buffer.read(_MAX_BYTES + 1)
    error = "the container's state is too big" if len(state) > _MAX_BYTES else attach(sys.argv[2], state)
    if error:
        report(f"graft: {error}")
    return 1 if error else 0


if __name__ == "__main__":
    raise SystemExit(main())
