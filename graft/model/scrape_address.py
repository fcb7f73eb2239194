"""Where metrics are served: ``unix:/PATH``, or a loopback address and port. Pure.

Metrics name containers and say what they do. Who may read them the mode of a unix socket says; a port of the loopback
address is open to every user of the host, and any other address to the network, so it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from graft.errors import UsageError
from graft.model.address import IPAddress, parse_socket_address, shown
from graft.model.unix_socket import UnixSocket, is_unix, parse_mode, parse_owner, parse_path

DEFAULT_MODE = 0o600


@dataclass(frozen=True, slots=True)
class LoopbackPort:
    """A TCP port of a loopback address."""

    address: IPAddress
    port: int


def parse_listen(text: str, owner: str | None = None, mode: str | None = None) -> UnixSocket | LoopbackPort:
    """Where to listen. Raises UsageError that names the field: --listen, --owner or --mode."""
    if is_unix(text):
        return UnixSocket(
            path=parse_path(text, "--listen"),
            owner=None if owner is None else parse_owner(owner, "--owner"),
            mode=DEFAULT_MODE if mode is None else parse_mode(mode, "--mode"),
        )
    for field, value in (("--owner", owner), ("--mode", mode)):
        if value is not None:
            raise UsageError(f"{field}: only a unix socket has one", "leave it out, or --listen unix:/PATH")
    found = parse_socket_address(text, "--listen")
    if not found.ip.is_loopback:
        raise UsageError(
            f"--listen: {shown(text)} is not a loopback address: anybody could read the metrics",
            "127.0.0.1:9469, [::1]:9469 or unix:/PATH",
        )
    return LoopbackPort(found.ip, found.port)
