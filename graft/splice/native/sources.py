"""Which modules of graftd are compiled, and from what. Imports nothing of Graft: the build reads it too. Pure, but for
reading the sources.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

MODULES = (
    "acceptor",
    "closing",
    "connection",
    "datagram_clients",
    "datagram_destinations",
    "datagram_places",
    "datagram_sockets",
    "datagrams",
    "descriptor_store",
    "event_loop",
    "far_check",
    "inbound",
    "kept",
    "kernel_flow",
    "namespace_sockets",
    "outside",
    "pipes",
    "resources",
    "shares",
    "slow_calls",
    "turns",
    "unix_endpoint",
    "waiting",
)
"""Of graft/splice: what is run for each connection, for each turn, and for what is moved."""

_DIGITS = 16


def library(folder: Path) -> str:
    """The name of the module that has the code of all of them, for the sources in ``folder`` (graft/splice).

    What was compiled from other sources has another name. Raises OSError where one cannot be read.
    """
    digest = hashlib.sha256()
    for name in MODULES:
        digest.update(hashlib.sha256((folder / f"{name}.py").read_bytes()).digest())
    return f"graftd_{digest.hexdigest()[:_DIGITS]}__mypyc"
