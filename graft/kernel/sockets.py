"""The TCP and UDP sockets of a network namespace, for people: sock_diag(7) through pyroute2.

The inode of a socket is what /proc/PID/fd names it by. (graft/kernel/sockdiag.py asks for listeners only, many
times a second.)
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from graft.address import format_ip, unmapped

# include/net/tcp_states.h; a UDP socket is CLOSE until it is connected.
STATES = {
    1: "established",
    2: "syn-sent",
    3: "syn-recv",
    4: "fin-wait-1",
    5: "fin-wait-2",
    6: "time-wait",
    7: "unconnected",
    8: "close-wait",
    9: "last-ack",
    10: "listening",
    11: "closing",
    12: "syn-recv",
}
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_EVERY_STATE = 0xFFFFFFFF  # pyroute2's own default leaves some out


@dataclass(frozen=True, slots=True)
class Listed:
    """One socket; addresses as ``1.2.3.4:80`` or ``[::1]:80``."""

    inode: int
    protocol: str
    state: str
    local: str
    remote: str


def listed() -> Iterator[Listed]:
    """Every TCP and UDP socket of the calling thread's namespace that has an address."""
    from pyroute2 import DiagSocket

    with DiagSocket() as diag:
        diag.bind()
        for protocol, number in PROTOCOLS.items():
            for family in (socket.AF_INET, socket.AF_INET6):
                for found in diag.get_sock_stats(family=family, protocol=number, states=_EVERY_STATE):
                    yield _read(protocol, found)


def _read(protocol: str, found: Any) -> Listed:
    return Listed(
        inode=found["idiag_inode"],
        protocol=protocol,
        state=STATES.get(found["idiag_state"], str(found["idiag_state"])),
        local=_format(found["idiag_src"], found["idiag_sport"]),
        remote=_format(found["idiag_dst"], found["idiag_dport"]),
    )


def _format(address: str, port: int) -> str:
    """An IPv4-mapped address is the IPv4 address that the network sees."""
    return f"{format_ip(unmapped(ip_address(address)))}:{port}"
