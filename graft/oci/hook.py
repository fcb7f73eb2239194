"""The commands that a runtime runs as hooks of a container. Quick to start: it imports next to nothing.

python -m graft.oci.hook attach SOCKET     createRuntime: the shim has the container attached, or it fails
python -m graft.oci.hook reap              poststop: rules of containers that are gone are taken away
"""

from __future__ import annotations

import os
import socket
import sys

_PATIENCE = 50.0
_MAX_BYTES = 1 << 20  # what the shim takes (graft/oci/state.py)


def attach(path: str, state: bytes) -> str:
    """Have the container that ``state`` (of the runtime's) tells of attached; what went wrong, "" for nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as shim:
        shim.settimeout(_PATIENCE)
        try:
            shim.connect(path)
            shim.sendall(state)
            shim.shutdown(socket.SHUT_WR)
            said = b""
            while chunk := shim.recv(65536):
                said += chunk
        except OSError as error:
            return f"the container's supervisor does not answer: {error.strerror or error}"
    if said == b"ok":
        return ""
    return said.decode(errors="replace") or "the container's supervisor ended before the container was attached"


def reap() -> None:
    """Forget the containers whose cgroup is gone."""
    from graft.datapath.dataplane import is_up
    from graft.model.settings import Settings
    from graft.state.installation import Installation

    settings = Settings.from_environment()
    if is_up(settings):
        Installation(settings).reap()


def say(text: str) -> None:
    """A line for the operator. crun gives its hooks no standard error: then the line goes to crun's own."""
    from graft.model.printable import printable

    nowhere = os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev
    try:
        with open(f"/proc/{os.getppid()}/fd/2" if nowhere else 2, "a", errors="replace", closefd=nowhere) as where:
            print(printable(text), file=where)
    except OSError:
        pass


def main() -> int:
    """The entry point; the exit status that a runtime takes as the hook's."""
    if sys.argv[1:2] == ["reap"]:
        reap()
        return 0
    state = sys.stdin.buffer.read(_MAX_BYTES + 1)
    wrong = "the container's state is too big" if len(state) > _MAX_BYTES else attach(sys.argv[2], state)
    if wrong:
        say(f"graft: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
