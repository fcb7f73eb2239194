"""MPTCP sockets, which Go's newer releases listen with by default: hooks see a subflow, the program its parent."""

from __future__ import annotations

import socket

import pytest

from tests.support.installation import Host
from tests.support.namespaces import HOST4

pytestmark = pytest.mark.e2e


@pytest.fixture(params=["swap", "born"])
def host(host: Host, request: pytest.FixtureRequest) -> Host:
    """The host, where every `graft run` has that transport."""
    return host.with_transport(request.param)


SERVER = """
import socket
listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
listener.bind(("0.0.0.0", 80))
listener.listen()
print(listener.getsockname(), listener.proto, flush=True)
connection, peer = listener.accept()
connection.sendall(repr((connection.getsockname(), peer)).encode())
connection.close()
"""

UNGRANTED = """
import errno, socket
sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
for call in (lambda: sock.connect(("HOST", 9)), sock.listen):
    try:
        call()
        print("done")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("client", [socket.IPPROTO_TCP, 262], ids=["tcp", "mptcp"])
def test_an_mptcp_listener_is_grafted_and_knows_its_own_port(host: Host, client: int) -> None:
    port = host.port()
    rule = f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"
    program = host.start("-i", rule, "--", "/usr/bin/python3", "-c", SERVER)
    program.says("('0.0.0.0', 80) 262")
    code = (
        f"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, {client}); "
        f"s.connect(('{HOST4}', {port})); print(s.getsockname()[0]); print(s.makefile().read())"
    )
    own, seen = host.client.run("/usr/bin/python3", "-c", code).splitlines()
    assert f"('{HOST4}', 80)" in seen and own in seen


def test_an_mptcp_socket_in_the_hosts_stack_may_not_listen_on_a_port_that_no_rule_grants(host: Host) -> None:
    rule = f"{HOST4}/32={host.endpoint('0.0.0.0:dynamic')}"
    code = UNGRANTED.replace("HOST", HOST4)
    # Where no supervisor sees a listen(), the listener hears nobody (tests/hostile/test_listeners.py).
    listens = "done" if host.run_flags else "EACCES"
    assert host.run(["-e", rule], "/usr/bin/python3", "-c", code).stdout.split() == ["ECONNREFUSED", listens]
