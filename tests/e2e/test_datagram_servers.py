"""Servers of UDP that people run, each with its own client, in the transports swap and born: a forwarding name server,
a time server, a QUIC server.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.building import SOURCES
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.program import Program
from tests.support.shell import Word, output

pytestmark = pytest.mark.e2e


@pytest.fixture(params=["swap", "born"])
def served(host: Host, request: pytest.FixtureRequest) -> Host:
    """The host, where every `graft run` has that transport."""
    return host.with_transport(request.param)


def rules(host: Host, *binds: str) -> tuple[list[str], list[int]]:
    """Rules for each of ``binds``, for any port of the kernel's choice, and to reach out; the host's ports."""
    ports = [host.port() for _ in binds]
    given = ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}", "-i", f"*:0={host.endpoint('0.0.0.0:dynamic')}"]
    for bind, port in zip(binds, ports, strict=True):
        given += ["-i", f"{bind}={host.endpoint(f'0.0.0.0:{port}')}"]
    return given, ports


def notifications(program: Program) -> int:
    """How many calls were trapped, of a program under `graft run -v`."""
    return program.complained.count("graft: ")


# ---- unbound


UNBOUND = """
server:
  interface: 0.0.0.0@53
  access-control: 0.0.0.0/0 allow
  username: ""
  chroot: ""
  directory: "{folder}"
  pidfile: ""
  use-syslog: no
  do-ip6: no
  do-daemonize: no
  num-threads: 1
  outgoing-range: 16
  outgoing-port-avoid: 0-65535
  outgoing-port-permit: {ports}
  module-config: "iterator"
  do-not-query-localhost: no
  local-zone: "graft.test." transparent
remote-control:
  control-enable: no
forward-zone:
  name: "."
  forward-addr: {forward}@{port}
"""


def dig(host: Host, port: int, name: str, *flags: str) -> str:
    """What a client's dig gets."""
    words = host.client.command("dig", "+short", "+tries=1", "+time=5", *flags, f"@{HOST4}", "-p", str(port), name)
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def test_unbound_forwards_the_questions_of_its_clients(served: Host, tmp_path: Path) -> None:
    """A server at its endpoint, and a client of another server from ports that it chooses: they are a range."""
    upstream = ("dnsmasq", "-k", "-C", "/dev/null", "--no-hosts", "--no-resolv", "--user=root", "--group=root",
                "--address=/graft.test/192.0.2.7", "--pid-file=", "--log-facility=-", "--port=5300",
                "--bind-interfaces", f"--listen-address={CLIENT4}")  # fmt: skip
    served.start_command(served.client.command(*upstream))
    file = tmp_path / "unbound.conf"
    file.write_text(UNBOUND.format(folder=tmp_path, forward=CLIENT4, port=5300, ports="40000-40063"))
    given, (port,) = rules(served, "0.0.0.0:53")
    given += ["-i", f"0.0.0.0:40000-40063={served.endpoint('0.0.0.0:41000-41063')}"]
    program = served.start("-v", *given, "--", "unbound", "-d", "-c", file)
    program.until("an answer", lambda: dig(served, port, "first.graft.test") == "192.0.2.7")
    assert dig(served, port, "second.graft.test", "+tcp") == "192.0.2.7"
    before = notifications(program)
    for number in range(20):
        assert dig(served, port, f"n{number}.graft.test") == "192.0.2.7"
    # For each question that it forwards a socket, its bind and its connect: none for what is sent and received.
    assert notifications(program) - before <= 3 * 20


# ---- NTP


TIME_SERVER = """
import socket, struct, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 123))
print('serves', flush=True)
while True:
    asked, peer = s.recvfrom(512)
    now = int((time.time() + 2208988800) * 2**32)
    head = bytes((0x24, 1, 6, 0xec)) + bytes(8) + b'TEST'
    s.sendto(head + struct.pack('>Q', now) + asked[40:48] + struct.pack('>QQ', now, now), peer)
"""
"""Says what time it is (RFC 5905, section 7.3), as of stratum 1."""


@pytest.mark.parametrize("server", ["outside", "under Graft"])
def test_a_time_client_asks_for_the_time(served: Host, server: str) -> None:
    """ntpdig of NTPsec, which asks port 123."""
    command = ("/usr/bin/python3", "-ISc", TIME_SERVER)
    if server == "outside":
        address = CLIENT4
        serving = served.start_command(served.client.command(*command, address))
    else:
        address = HOST4
        given = [*rules(served)[0], "-i", f"0.0.0.0:123={served.endpoint(f'{HOST4}:123')}"]
        serving = served.start("-v", *given, "--", *command, "0.0.0.0")
    serving.says("serves")
    asked = notifications(serving)
    result = served.run(["-v", *rules(served)[0]], "ntpdig", "-t", "5", address)
    assert f"{address} s1 no-leap" in result.stdout
    assert notifications(serving) == asked
    assert result.stderr.count("graft: ") <= 4


# ---- QUIC


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate and its key."""
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    output(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=graft.test", "-out", files[0], "-keyout", files[1]])  # fmt: skip
    return files


def quic(*words: Word) -> tuple[Word, ...]:
    return (sys.executable, SOURCES / "quic.py", *words)


def test_a_quic_server_serves_clients_outside_and_under_graft(served: Host, certificate: tuple[Path, Path]) -> None:
    given, (port,) = rules(served, "0.0.0.0:443")
    server = served.start("-v", *given, "--", *quic("serve", "0.0.0.0", 443, *certificate))
    server.says("serves")
    asked = notifications(server)
    assert output(served.client.command(*quic("ask", HOST4, port, "outside"))) == "OUTSIDE 7000\n"
    inside = served.run([*rules(served)[0]], *quic("ask", HOST4, port, "inside"))
    assert inside.stdout == "INSIDE 6000\n"
    assert notifications(server) == asked
