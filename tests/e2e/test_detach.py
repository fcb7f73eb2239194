"""`graft detach`: which sockets it closes, which it leaves, and what it says of both."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeCgroup, StartPuppet
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.wait import until

pytestmark = pytest.mark.e2e


def has_ended(connection: socket.socket) -> bool:
    """Whether a connection ends: with a reset, or, by a kernel that cannot reset it for us, with an end of file."""
    try:
        return connection.recv(10) == b""
    except ConnectionResetError:
        return True


def test_detach_ends_what_was_granted_and_says_what_is_left(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    path, port, own = make_cgroup(), host.port(), host.port()
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={endpoint}")
    program = start_puppet(path)
    program.listener("0.0.0.0", own)
    granted = program.listener("0.0.0.0", 80)
    connection = host.client.connected(HOST4, port)
    program.say("accept", granted)
    said = host.graft("detach", "--cgroup", path).stdout
    closed, _, kept = said.partition("still open")
    assert f"tcp listening 0.0.0.0:{port} (process {program.pid}, bound as 0.0.0.0:80 to {endpoint})" in closed
    assert f"tcp listening 0.0.0.0:{own}" in kept
    assert has_ended(connection), "the connection continues"
    with pytest.raises(ConnectionRefusedError):
        host.client.connected(HOST4, port)
    host.client.connected(HOST4, own).close()
    assert program.bind("0.0.0.0", 80) == "ok", "still rewritten"
    assert host.ps() == []
    connection.close()
    assert host.graft("detach", "--cgroup", path, status=3).stderr


def test_detach_lets_no_datagram_in_any_more(host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet) -> None:
    path, port = make_cgroup(), host.port()
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:53={endpoint}")
    program = start_puppet(path)
    sock = program.socket("udp")
    assert program.say("bind", sock, "0.0.0.0", 53) == "ok"
    with host.client.inside():
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.sendto(b"before", (HOST4, port))
    assert program.say("receive", sock)[0] == "before"
    said = host.graft("detach", "--cgroup", path).stdout
    assert f"udp unconnected 0.0.0.0:{port} (process {program.pid}, bound as 0.0.0.0:53 to {endpoint})" in said
    client.connect((HOST4, port))
    client.settimeout(15)
    client.send(b"after")
    with pytest.raises(ConnectionRefusedError):  # as where no socket is
        client.recv(100)
    lines = host.netns.run("cat", "/proc/net/udp").splitlines()
    fields = next(line.split() for line in lines if f":{port:04X} " in line)
    assert fields[4].endswith(":00000000"), "it was let in"
    client.close()


def test_detach_ends_the_outgoing_connections_of_a_swapped_container(host: Host) -> None:
    rule = f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}"
    listener = host.client.listener(CLIENT4)
    script = (
        f"import socket; s = socket.create_connection(('{CLIENT4}', {listener.getsockname()[1]})); print(s.recv(9))"
    )
    program = host.start("-e", rule, "--", "/usr/bin/python3", "-uISc", script)
    connection, _ = listener.accept()
    connection.settimeout(15)
    said = host.graft("detach", "--cgroup", host.container(program).name).stdout
    assert f"with {CLIENT4}:{listener.getsockname()[1]}" in said.partition("still open")[0]
    assert has_ended(connection)
    program.wait()
    connection.close()
    listener.close()


def test_detach_can_leave_connections(host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet) -> None:
    path, port = make_cgroup(), host.port()
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}")
    program = start_puppet(path)
    granted = program.listener("0.0.0.0", 80)
    connection = host.client.connected(HOST4, port)
    accepted = program.say("accept", granted)
    assert "established" in host.graft("detach", "--cgroup", path, "--keep-connections").stdout.partition("still")[2]
    connection.sendall(b"on")
    assert program.say("receive", accepted)[0] == "on"
    connection.close()


def test_detached_from_its_supervisor_a_program_listens_on_the_host_no_more(host: Host, tmp_path: Path) -> None:
    port = host.port()
    rule = f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"
    program = host.start("-i", rule, "--", "busybox", "nc", "-ll", "-p", "80", "-e", "true")
    program.until("it listens", lambda: host.netns.listens(port))
    record = host.container(program)
    said = host.graft("detach", "--cgroup", record.name).stdout
    assert f"0.0.0.0:{port}" in said.partition("still open")[0]
    until("the listener to be gone", lambda: not host.netns.listens(port))
