"""Socket addresses as the kernel and the maps have them: 16 bytes of address, IPv4-mapped ones as IPv4."""

from __future__ import annotations

import socket
import sys
from functools import lru_cache
from typing import NamedTuple

from graft.model.address import unmapped_bytes


class Sockaddr(NamedTuple):
    """An address from a program's memory, IPv4-mapped ones as IPv4, as in the hooks. 16 bytes, port in host order."""

    family: int
    address: bytes
    port: int
    mapped: bool = False

    @property
    def ip(self) -> str:
        """The address as text."""
        if self.family == 4:
            return socket.inet_ntop(socket.AF_INET, self.address[:4])
        return socket.inet_ntop(socket.AF_INET6, self.address)

    def __str__(self) -> str:
        return f"{self.ip}:{self.port}" if self.family == 4 else f"[{self.ip}]:{self.port}"


@lru_cache(maxsize=1024)
def parse_sockaddr(raw: bytes) -> Sockaddr | None:
    """From struct sockaddr_in or sockaddr_in6 (ip(7), ipv6(7)); None for anything else, or where it is too short."""
    if len(raw) < 8:
        return None
    kind = int.from_bytes(raw[:2], sys.byteorder)
    port = raw[2] << 8 | raw[3]
    if kind == socket.AF_INET:
        return Sockaddr(4, raw[4:8] + bytes(12), port)
    if kind != socket.AF_INET6 or len(raw) < 24:
        return None
    family, address = unmapped_bytes(raw[8:24])
    return Sockaddr(family, address, port, mapped=family == 4)
