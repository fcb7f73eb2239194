"""What transport swap leaves in the container's own namespace, for the same programs and the same process."""

from __future__ import annotations

import pytest

from tests.e2e.test_programs import in_rule, out_rule
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import HOST4

pytestmark = pytest.mark.e2e


def test_programs_inside_talk_over_loopback_as_before(host: Host, programs: Programs) -> None:
    rules, _ = in_rule(host)
    script = (
        "import socket\n"
        "a = socket.socket(); a.bind(('127.0.0.1', 8000)); a.listen()\n"
        "b = socket.create_connection(('127.0.0.1', 8000)); c, _ = a.accept()\n"
        "b.sendall(b'over loopback'); print(c.recv(100).decode(), c.getpeername()[0])\n"
        "d = socket.socket(socket.AF_INET6); d.bind(('::1', 0)); d.listen()\n"
        "e = socket.create_connection(d.getsockname()[:2]); f, _ = d.accept()\n"
        "f.sendall(b'six'); print(e.recv(100).decode())\n"
    )
    result = host.run([*rules, *out_rule(host)], "/usr/bin/python3", "-ISc", script)
    assert result.stdout == "over loopback 127.0.0.1\nsix\n"


def test_udp_and_unix_sockets_are_left_alone(host: Host) -> None:
    rules, _ = in_rule(host)
    script = (
        "import os, socket\n"
        "a = socket.socket(type=socket.SOCK_DGRAM); a.bind(('127.0.0.1', 80))\n"
        "b = socket.socket(type=socket.SOCK_DGRAM); b.connect(('127.0.0.1', 80)); b.send(b'udp')\n"
        "print(a.recv(9).decode())\n"
        "c = socket.socket(socket.AF_UNIX); c.bind('\\0graft-test'); c.listen()\n"
        "d = socket.socket(socket.AF_UNIX); d.connect('\\0graft-test'); d.send(b'unix')\n"
        "print(c.accept()[0].recv(9).decode())\n"
    )
    assert host.run([*rules, *out_rule(host)], "/usr/bin/python3", "-ISc", script).stdout == "udp\nunix\n"


def test_a_range_of_ports_becomes_a_dynamic_endpoint(host: Host, programs: Programs) -> None:
    rules = ["-i", f"0.0.0.0:8000-8009={host.endpoint(f'{HOST4}:dynamic')}"]
    steps: list[str] = []
    for port in (8000, 8005, 8009, 8010):
        steps += ["socket", "4", "bind", "0.0.0.0", str(port), "listen", "name", "home"]
    said = host.run(rules, programs["calls"], *steps).stdout.splitlines()
    homes = [line == f"home {host.netns.cookie}" for line in said[3::4]]
    assert homes == [True, True, True, False]
    assert said[2::4] == [f"name 0.0.0.0 {port}" for port in (8000, 8005, 8009, 8010)]
