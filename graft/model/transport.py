"""How a container's sockets reach the host's stack, and where a socket lives: values that C and Python share."""

from __future__ import annotations

import enum

from graft.errors import UsageError


class Transport(enum.IntEnum):
    """How a container's sockets reach the host's stack: GRAFT_TRANSPORT_* of bpf/graft.h."""

    DIRECT = 1
    SWAP = 2
    SPLICE = 3
    BORN = 4

    def __str__(self) -> str:
        return self.name.lower()

    @property
    def is_supervised(self) -> bool:
        """Whether a supervisor puts the container's sockets on the host's stack."""
        return self in (Transport.SWAP, Transport.BORN)

    @classmethod
    def parse(cls, text: str, field: str = "transport") -> Transport:
        """The transport of that name. Raises UsageError that names ``field``."""
        try:
            return cls[text.upper()]
        except KeyError:
            raise UsageError(f"{field}: {text!r} is not a transport", "direct, swap, born or splice") from None


class Home(enum.IntEnum):
    """Where a socket lives: GRAFT_HOME_* of bpf/graft.h."""

    CONTAINER = 0
    HOST = 1
    FERRY = 2
