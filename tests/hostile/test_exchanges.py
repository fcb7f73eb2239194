"""Datagrams in transport splice: who may take what graftd relays."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.installation import Host
from tests.support.namespaces import CLIENT4
from tests.support.plain import plain
from tests.support.wait import until

pytestmark = pytest.mark.e2e

Without = Callable[[str], Host]
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")
THIEF = """
import socket, sys
thief = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); thief.bind(("0.0.0.0", int(sys.argv[1])))
print("ready", flush=True); print("stole", thief.recv(100), flush=True)
"""


def is_robbed(host: Host, connects: bool) -> bool:
    """Whether a program that took the port of a graftd which was killed gets a container's granted datagrams."""
    with plain(host) as container, container.udp() as victim:
        container.attach("-e", f"{CLIENT4}={host.endpoint('0.0.0.0:dynamic')}")
        (relay,) = (value.datagram_port for _, value in host.maps.relays.items())
        pid = container.daemon()
        os.kill(pid, signal.SIGKILL)
        until("graftd is gone", lambda: not Path(f"/proc/{pid}").exists())
        thief = container.start(*NOBODY, sys.executable, "-c", THIEF, relay)
        thief.says("ready")
        try:
            if connects:
                victim.connect((CLIENT4, 9))
                victim.send(b"secret")
            else:
                victim.sendto(b"secret", (CLIENT4, 9))
        except ConnectionRefusedError:
            return False
        thief.says("stole b'secret'")
        return True


@pytest.mark.parametrize("connects", [False, True])
def test_nobody_who_takes_the_relays_port_gets_a_containers_datagrams(host: Host, connects: bool) -> None:
    assert not is_robbed(host, connects)


@pytest.mark.parametrize("connects", [False, True])
def test_control_where_the_hook_does_not_look_who_receives_he_does(without: Without, connects: bool) -> None:
    assert is_robbed(without("relay's mark for datagrams"), connects)
