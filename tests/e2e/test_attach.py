"""Containers that run already, in the host's namespace: attached, confined, served, detached."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from graft.datapath.layout import HookDecision
from graft.kernel import cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6, Netns
from tests.support.puppet import Puppet, puppet
from tests.support.wait import until

pytestmark = pytest.mark.e2e

NOBODY = 65534
_names = itertools.count(1)
MakeCgroup = Callable[..., Path]
Start = Callable[..., Puppet]


@pytest.fixture
def folder(host: Host) -> Iterator[MakeCgroup]:
    """Makes cgroups outside Graft's own, as an engine would; they are detached and removed afterwards."""
    made: list[Path] = []

    def make(parent: Path | None = None) -> Path:
        path = (parent or cgroup.v2_mount()) / f"attached-{os.getpid()}-{next(_names)}"
        path.mkdir()
        made.append(path)
        return path

    yield make
    for path in reversed(made):
        if path.exists():
            host.graft("detach", "--cgroup", path, status=None)
            cgroup.kill(path)
            cgroup.remove(path)


@pytest.fixture
def start(host: Host, folder: MakeCgroup) -> Iterator[Start]:
    """Starts a process in a cgroup, in the host's namespace unless told otherwise."""
    with ExitStack() as stack:
        yield lambda path, netns=host.netns.path, user=0: stack.enter_context(puppet(path, netns, user))


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a policy."""

    def write(text: str) -> Path:
        path = tmp_path / f"policy-{next(_names)}.yaml"
        path.write_text(text)
        return path

    return write


def ps(host: Host, path: Path) -> dict[str, Any]:
    """What `graft ps --json` says of a cgroup."""
    return next(one for one in json.loads(host.graft("ps", "--json").stdout) if one["cgroup"] == str(path))


def hello(netns: Netns, address: str, port: int) -> str:
    with netns.connected(address, port, 5) as sock:
        return sock.recv(100).decode()


def has_ended(connection: socket.socket) -> bool:
    """Whether a connection ends: with a reset, or, by a kernel that cannot reset it for us, with an end of file."""
    try:
        return connection.recv(10) == b""
    except ConnectionResetError:
        return True


DENY_ALL = """
name: nothing
default: deny
"""


def confined(endpoint: str, extra: str = "") -> str:
    return f"""
name: confined
ingress:
  - bind: 0.0.0.0:80
    endpoint: {endpoint}
{extra}
default: deny
"""


def test_two_containers_on_one_port_are_served_on_two_endpoints(host: Host, folder: MakeCgroup, start: Start) -> None:
    ports = host.port(), host.port()
    servers = []
    for port in ports:
        path = folder()
        host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}")
        server = start(path, user=NOBODY)
        listener = server.listener("0.0.0.0", 80)
        assert server.say("name", listener) == ["0.0.0.0", 80]
        servers.append((server, listener, port))
    for server, listener, port in servers:
        with host.client.connected(HOST4, port) as connection:
            peer = server.say("answer", listener, f"port {port}")
            assert peer[0] == CLIENT4
            assert connection.recv(100).decode() == f"port {port}"
    assert not host.netns.listens(80)
    assert cgroup.processes(host.cgroup) == [], "a process of Graft's runs"


def test_ipv6_and_udp_are_served_too(host: Host, folder: MakeCgroup, start: Start) -> None:
    path, port = folder(), host.port()
    four, six = host.endpoint(f"{HOST4}:{port}"), host.endpoint(f"[{HOST6}]:{port}")
    host.graft("attach", "--cgroup", path, "-i", f"*:53={four}", "-i", f"[::]:53={six}")
    server = start(path)
    for family, address, mine in ((4, HOST4, "0.0.0.0"), (6, HOST6, "::")):
        sock = server.socket("udp", family)
        assert server.say("bind", sock, mine, 53) == "ok"
        assert server.say("name", sock) == [mine, 53]
        with host.client.inside():
            client = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM)
        client.sendto(b"ask", (address, port))
        said, peer, peer_port = server.say("receive", sock)
        assert said == "ask" and peer == (CLIENT6 if family == 6 else CLIENT4)
        assert server.say("sendto", sock, peer, peer_port) == "ok"
        client.settimeout(5)
        assert client.recvfrom(100)[1][:2] == (address, port)
        client.close()
        listener = server.listener(mine, 53)
        with host.client.connected(address, port) as connection:
            server.say("answer", listener, "tcp")
            assert connection.recv(100) == b"tcp"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("anywhere", "loopback", "beside", "host_address"),
    [("0.0.0.0", "127.0.0.1", CLIENT4, HOST4), ("::", "::1", CLIENT6, HOST6)],
)
def test_with_deny_a_container_binds_and_connects_nowhere_else(
    host: Host,
    folder: MakeCgroup,
    start: Start,
    policy: Callable[[str], Path],
    protocol: str,
    anywhere: str,
    loopback: str,
    beside: str,
    host_address: str,
) -> None:
    path, port, family = folder(), host.port(), 6 if ":" in anywhere else 4
    spec = f"[{host_address}]:{port}" if family == 6 else f"{host_address}:{port}"
    written = f"[{anywhere}]:80" if family == 6 else f"{anywhere}:80"
    host.graft(
        "attach",
        "--cgroup",
        path,
        "--policy",
        policy(confined(host.endpoint(spec)).replace("0.0.0.0:80", f'"{written}"')),
    )
    there = host.client.listener(beside)
    here = host.netns.listener(loopback)
    server = start(path)
    for address, other in ((anywhere, 81), (anywhere, 0), (loopback, 80), (host_address, 80), (anywhere, port)):
        assert server.bind(address, other, protocol) == "EACCES", (address, other)
    for listener in (there, here):
        assert server.connect(listener.getsockname()[0], listener.getsockname()[1], protocol) == "EACCES"
    if protocol == "udp":
        assert server.sendto(beside, 53) == server.sendto(loopback, 53) == "EACCES"
    assert server.bind(anywhere, 80, protocol) == "ok"
    assert host.decisions(ps(host, path)["id"])[HookDecision.REFUSED_BIND] >= 5
    there.close()
    here.close()


def test_with_deny_loopback_needs_a_rule_of_its_own(
    host: Host, folder: MakeCgroup, start: Start, policy: Callable[[str], Path]
) -> None:
    path = folder()
    listener = host.netns.listener("127.0.0.1")
    port = listener.getsockname()[1]
    everything = "egress:\n  - to: 0.0.0.0/0\n    action: container\n"
    host.graft("attach", "--cgroup", path, "--policy", policy(DENY_ALL + everything))
    program = start(path)
    assert program.connect("127.0.0.1", port) == "EACCES"
    host.graft(
        "attach", "--cgroup", path, "--policy", policy(DENY_ALL + everything.replace("0.0.0.0/0", "127.0.0.0/8"))
    )
    assert program.connect("127.0.0.1", port) == "ok"
    listener.close()


def test_a_granted_destination_is_reached_from_its_endpoint(host: Host, folder: MakeCgroup, start: Start) -> None:
    path = folder()
    source = host.endpoint("127.0.0.5:dynamic")
    host.graft("attach", "--cgroup", path, "-e", f"127.0.0.0/8={source}")
    program = start(path)
    listener = host.netns.listener("127.0.0.1")
    assert program.connect("127.0.0.1", listener.getsockname()[1]) == "ok"
    assert listener.accept()[1][0] == "127.0.0.5"
    with host.netns.inside():
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    datagrams.settimeout(5)
    to = datagrams.getsockname()
    sock = program.socket("udp")
    assert program.say("sendto", sock, *to) == "ok"
    assert datagrams.recvfrom(10)[1][0] == "127.0.0.5", "of an unconnected datagram"
    assert program.say("connect", program.socket("udp"), *to) == "ok"
    listener.close()
    datagrams.close()


def test_a_datagram_socket_may_be_connected_again(
    host: Host, folder: MakeCgroup, start: Start, policy: Callable[[str], Path]
) -> None:
    path = folder()
    egress = f"egress:\n  - to: 127.0.0.0/8\n    endpoint: {host.endpoint('127.0.0.5:dynamic')}\n"
    host.graft("attach", "--cgroup", path, "--policy", policy(DENY_ALL + egress))
    program = start(path)
    sock = program.socket("udp")
    assert [program.say("connect", sock, "127.0.0.1", port) for port in (53, 54)] == ["ok", "ok"]


def test_a_listener_that_was_bound_to_nothing_hears_nobody_where_binds_are_denied(
    host: Host, folder: MakeCgroup, start: Start, policy: Callable[[str], Path]
) -> None:
    path = folder()
    program = start(path)
    free = program.socket()
    assert program.say("listen", free) == "ok"
    host.graft("attach", "--cgroup", path, "--policy", policy(DENY_ALL))
    held = program.socket()
    assert program.say("listen", held) == "ok"
    host.client.connected(HOST4, program.say("name", free)[1]).close()
    with pytest.raises(OSError):
        host.client.connected(HOST4, program.say("name", held)[1], 2)
    assert program.say("option", held, socket.SOL_SOCKET, 62, 0) == "EPERM"  # SO_BINDTOIFINDEX, to untie it


def test_options_that_reach_past_the_policy_are_refused_where_something_is_denied(
    host: Host, folder: MakeCgroup, start: Start, policy: Callable[[str], Path]
) -> None:
    confined_one, free_one = folder(), folder()
    host.graft("attach", "--cgroup", confined_one, "--policy", policy(DENY_ALL))
    host.graft("attach", "--cgroup", free_one, "-i", f"*:80={host.endpoint('0.0.0.0:dynamic')}")
    for path, result in ((confined_one, "EPERM"), (free_one, "ok")):
        program = start(path)
        for level, option, value in ((socket.SOL_SOCKET, socket.SO_BINDTODEVICE, "lo"), (socket.SOL_IP, 19, 1)):
            assert program.say("option", program.socket(), level, option, value) == result
        assert program.say("option", program.socket(), socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1) == "ok"


def test_after_a_taken_endpoint_a_container_may_still_bind_what_is_its_own(
    host: Host, folder: MakeCgroup, start: Start
) -> None:
    path, port, own = folder(), host.port(), host.port()
    taken = host.netns.listener("0.0.0.0", port)
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}")
    program = start(path)
    sock = program.socket()
    assert program.say("bind", sock, "0.0.0.0", 80) == "EADDRINUSE"
    assert program.say("bind", sock, "0.0.0.0", own) == "ok"
    assert program.say("name", sock) == ["0.0.0.0", own]
    assert program.say("listen", sock) == "ok"
    host.client.connected(HOST4, own).close()
    taken.close()


def test_a_namespace_that_a_host_network_container_makes_is_left_alone(
    host: Host, folder: MakeCgroup, start: Start
) -> None:
    path = folder()
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{host.port()}')}")
    program = start(path)
    assert program.say("netns") == "ok"
    listener = program.listener("0.0.0.0", 80)
    assert program.say("name", listener) == ["0.0.0.0", 80]
    assert ps(host, path)["sockets"] == []


def test_sockets_of_before_are_listed_and_stay_as_they_are(
    host: Host, folder: MakeCgroup, start: Start, policy: Callable[[str], Path]
) -> None:
    path, port = folder(), host.port()
    program = start(path)
    listener = program.listener("0.0.0.0", port)
    said = host.graft("attach", "--cgroup", path, "--policy", policy(DENY_ALL)).stdout
    assert f"tcp listening 0.0.0.0:{port} (process {program.pid})" in said
    assert "which keep their addresses" in said
    with host.client.connected(HOST4, port) as connection:
        program.say("answer", listener, "as before")
        assert connection.recv(100) == b"as before"


def test_what_starts_later_below_an_attached_slice_is_covered(host: Host, folder: MakeCgroup, start: Start) -> None:
    slice_, port = folder(), host.port()
    host.graft("attach", "--cgroup", slice_, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}")
    server = start(folder(slice_))
    listener = server.listener("0.0.0.0", 80)
    with host.client.connected(HOST4, port) as connection:
        server.say("answer", listener, "from below")
        assert connection.recv(100) == b"from below"


def test_a_cgroup_above_or_below_an_attached_one_is_refused(host: Host, folder: MakeCgroup) -> None:
    top = folder()
    middle = folder(top)
    bottom = folder(middle)
    rule = ["-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}"]
    host.graft("attach", "--cgroup", middle, *rule)
    for path, where in ((top, "above"), (bottom, "below")):
        said = host.graft("attach", "--cgroup", path, *rule, status=7).stderr
        assert f"{path} lies {where} {middle}" in said
    beside = folder(top)
    host.graft("attach", "--cgroup", beside, *rule)


def test_a_cgroup_that_goes_takes_its_rules_with_it(host: Host, folder: MakeCgroup, start: Start) -> None:
    path, port = folder(), host.port()
    written = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={written}")
    number = ps(host, path)["id"]
    path.rmdir()
    path.mkdir()  # another one, at the same place
    assert json.loads(host.graft("ps", "--json").stdout) == []
    assert [key for key, _ in host.maps.containers.items() if key.value == number] == []
    assert list(host.maps.ingress.keys()) == []
    program = start(path)
    assert program.say("bind", sock := program.socket(), "0.0.0.0", port + 10_000) == "ok"
    assert program.say("name", sock)[1] == port + 10_000
    host.graft("ep", "del", written)


def test_detach_ends_what_was_granted_and_says_what_is_left(host: Host, folder: MakeCgroup, start: Start) -> None:
    path, port, own = folder(), host.port(), host.port()
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={endpoint}")
    program = start(path)
    program.listener("0.0.0.0", own)
    granted = program.listener("0.0.0.0", 80)
    connection = host.client.connected(HOST4, port)
    program.say("accept", granted)
    said = host.graft("detach", "--cgroup", path).stdout
    closed, _, kept = said.partition("still open")
    assert f"tcp listening 0.0.0.0:{port} (process {program.pid}, bound as 0.0.0.0:80 to {endpoint})" in closed
    assert f"tcp listening 0.0.0.0:{own}" in kept
    assert has_ended(connection), "the connection goes on"
    with pytest.raises(ConnectionRefusedError):
        host.client.connected(HOST4, port)
    host.client.connected(HOST4, own).close()
    assert program.bind("0.0.0.0", 80) == "ok", "still rewritten"
    assert json.loads(host.graft("ps", "--json").stdout) == []
    connection.close()
    assert host.graft("detach", "--cgroup", path, status=3).stderr


def test_detach_lets_no_datagram_in_any_more(host: Host, folder: MakeCgroup, start: Start) -> None:
    path, port = folder(), host.port()
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:53={endpoint}")
    program = start(path)
    sock = program.socket("udp")
    assert program.say("bind", sock, "0.0.0.0", 53) == "ok"
    with host.client.inside():
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.sendto(b"before", (HOST4, port))
    assert program.say("receive", sock)[0] == "before"
    said = host.graft("detach", "--cgroup", path).stdout
    assert f"udp unconnected 0.0.0.0:{port} (process {program.pid}, bound as 0.0.0.0:53 to {endpoint})" in said
    client.sendto(b"after", (HOST4, port))

    def dropped() -> bool:
        """Whether the kernel has dropped a datagram there, in the last column; what is queued is in the fifth."""
        lines = host.netns.run("cat", "/proc/net/udp").splitlines()
        fields = next(line.split() for line in lines if f":{port:04X} " in line)
        assert fields[4].endswith(":00000000"), "it was let in"
        return fields[-1] == "1"

    until("the datagram is dropped", dropped)
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


def test_detach_can_leave_connections(host: Host, folder: MakeCgroup, start: Start) -> None:
    path, port = folder(), host.port()
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}")
    program = start(path)
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


def test_ps_shows_sockets_supervisor_and_endpoints(host: Host, folder: MakeCgroup, start: Start) -> None:
    path, port = folder(), host.port()
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={endpoint}")
    server = start(path)
    server.listener("0.0.0.0", 80)
    seen = ps(host, path)
    assert (seen["transport"], seen["endpoints"], seen["supervisor"], seen["processes"]) == (
        "direct",
        [endpoint],
        None,
        1,
    )
    assert seen["namespaces"] == [os.stat(host.netns.path).st_ino]
    (sock,) = seen["sockets"]
    assert sock == {
        "protocol": "tcp",
        "state": "listening",
        "local": f"0.0.0.0:{port}",
        "remote": "0.0.0.0:0",
        "endpoint": endpoint,
        "asked": "0.0.0.0:80",
        "pid": server.pid,
    }
    swapped = host.port()
    rule = f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{swapped}')}"
    program = host.start("-i", rule, "--", "busybox", "nc", "-ll", "-p", "80", "-e", "true")
    program.until("it listens", lambda: host.netns.listens(swapped))
    seen = ps(host, Path(host.container(program).cgroup))
    assert seen["supervisor"] == host.supervisor(program)
    assert [one["local"] for one in seen["sockets"]] == [f"0.0.0.0:{swapped}"]
    line = next(one for one in host.graft("ps").stdout.splitlines() if "swap" in one)
    assert f"tcp 0.0.0.0:{swapped}" in line


def test_a_program_of_graft_run_gets_another_policy_by_attach(host: Host, tmp_path: Path) -> None:
    first, second = host.port(), host.port()
    program = host.start(
        "-i",
        f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{first}')}",
        "--",
        "sh",
        "-c",
        "busybox nc -l -p 80; busybox nc -l -p 80",
    )
    program.until("it listens", lambda: host.netns.listens(first))
    said = host.graft(
        "attach", "--cgroup", host.container(program).cgroup, "-i", f"*:80={host.endpoint(f'0.0.0.0:{second}')}"
    )
    assert "transport swap: it has a supervisor" in said.stdout
    host.client.connected(HOST4, first).close()
    program.until("it listens on the other endpoint", lambda: host.netns.listens(second))


def test_attach_says_what_it_found_and_which_transport_serves(host: Host, folder: MakeCgroup, start: Start) -> None:
    path = folder()
    start(path)
    said = host.graft("attach", "--cgroup", path.name, "-i", f"*:80={host.endpoint('0.0.0.0:dynamic')}").stdout
    assert f"1 process in the host's network namespace net:[{os.stat(host.netns.path).st_ino}]\n" in said
    assert "transport direct: it shares the host's network namespace" in said
    for impossible, reason in (("swap", "already on the host's stack"), ("splice", "already on the host's stack")):
        refused = host.graft("attach", "--cgroup", path, "--transport", impossible, "-i", "*:80=x", status=7).stderr
        assert f"{impossible} is impossible" in refused and reason in refused


def test_a_name_that_nothing_has_says_what_was_tried(host: Host) -> None:
    said = host.graft("attach", "--cgroup", "no-such-thing", status=3).stderr
    assert (
        "no cgroup 'no-such-thing'" in said
        and "docker" in said
        and "podman" in said
        and "no-such-thing.service" in said
    )


def test_a_unit_is_found_by_its_cgroup_where_systemd_cannot_be_asked(host: Host, folder: MakeCgroup) -> None:
    path = folder() / "grafted-unit.service"
    path.mkdir()
    said = host.graft("attach", "--cgroup", "grafted-unit", "-i", f"*:80={host.endpoint('0.0.0.0:dynamic')}").stdout
    assert f"grafted-unit.service: systemd, {path}" in said
    host.graft("detach", "--cgroup", "grafted-unit.service")


def test_a_policy_is_shown_and_replaced_with_its_endpoints(
    host: Host, folder: MakeCgroup, start: Start, policy: Callable[[str], Path]
) -> None:
    path, first, second = folder(), host.port(), host.port()
    text = """
name: shown
endpoints:
  shown4: 0.0.0.0:PORT
ingress:
  - bind: 0.0.0.0:8000-8099
    endpoint: shown4
egress:
  - to: 10.0.0.0/8
    action: deny
default:
  connect: container
  bind: deny
"""
    host.graft("attach", "--cgroup", path, "--policy", policy(text.replace("PORT", str(first))))
    shown = host.graft("policy", "show", path).stdout
    assert f"ingress any 0.0.0.0:8000-8099 -> shown4 = 0.0.0.0:{first}" in shown
    assert "egress any 10.0.0.0/8 -> deny" in shown and "else: bind deny, connect container" in shown
    said = host.graft("policy", "apply", policy(text.replace("PORT", str(second)))).stdout
    assert said.startswith(f"{path.name}: policy shown")
    assert json.loads(host.graft("policy", "show", path, "--json").stdout)["rules"][1]["outcome"].endswith(f":{second}")
    program = start(path)
    program.listener("0.0.0.0", 8042)
    assert host.netns.listens(second) and not host.netns.listens(first)
    assert host.graft("policy", "apply", policy("name: nobody-has-it\n"), status=3).stderr
    host.graft("detach", "--cgroup", path)
    assert "shown4" not in host.graft("ep", "show").stdout


def test_no_policy_is_lost_where_the_next_one_is_wrong(
    host: Host, folder: MakeCgroup, start: Start, policy: Callable[[str], Path]
) -> None:
    path, port = folder(), host.port()
    good = f"name: kept\nendpoints:\n  kept4: 0.0.0.0:{port}\ningress:\n  - bind: 0.0.0.0:80\n    endpoint: kept4\n"
    host.graft("attach", "--cgroup", path, "--policy", policy(good))
    wrong = good.replace(str(port), str(host.port())) + "  - bind: 0.0.0.0:81\n    endpoint: nowhere\n"
    host.graft("attach", "--cgroup", path, "--policy", policy(wrong), status=2)
    start(path).listener("0.0.0.0", 80)
    assert host.netns.listens(port)


def test_endpoints_of_a_policy_that_is_refused_stay_as_they_were(
    host: Host, folder: MakeCgroup, policy: Callable[[str], Path]
) -> None:
    path, port = folder(), host.port()
    taken = host.endpoint(f"0.0.0.0:{host.port()}")
    text = f"name: kept\nendpoints:\n  kept5: 0.0.0.0:{port}\ningress:\n  - bind: 0.0.0.0:80\n    endpoint: kept5\n"
    host.graft("attach", "--cgroup", path, "--policy", policy(text))
    other = text.replace(str(port), str(host.port())).replace("ingress:", f"  {taken}: 0.0.0.0:9\ningress:")
    host.graft("attach", "--cgroup", path, "--policy", policy(other), status=4)
    assert f"kept5 = 0.0.0.0:{port}" in host.graft("policy", "show", path).stdout
    assert len(list(host.maps.endpoints.keys())) == len(host.graft("ep", "show").stdout.splitlines())


def test_a_policy_is_replaced_under_load_with_no_refused_request(
    host: Host, folder: MakeCgroup, policy: Callable[[str], Path], tmp_path: Path
) -> None:
    path, front, back = folder(), host.port(), host.port()
    inlet, outlet = host.endpoint(f"0.0.0.0:{front}"), host.endpoint("127.0.0.7:dynamic")
    egress = f"egress:\n  - to: 127.0.0.0/8\n    ports: [{back}]\n    endpoint: {outlet}\n"
    texts = [confined(inlet, egress), confined(inlet, egress).replace("name: confined", "name: same-again")]
    policies = [policy(text) for text in texts]
    host.graft("attach", "--cgroup", path, "--policy", policies[0])
    # Each request makes nginx connect to a server behind it, by a rule without which it is refused.
    configuration = tmp_path / "proxy.conf"
    scratch = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    configuration.write_text(
        f"""daemon off; worker_processes 1; pid {tmp_path}/pid; error_log {tmp_path}/errors; user root;
events {{ worker_connections 512; }}
http {{ access_log off; client_body_temp_path {tmp_path}/body; {scratch}
  server {{ listen 80; location / {{ proxy_pass http://127.0.0.1:{back}; }} }} }}"""
    )
    behind = tmp_path / "behind.conf"
    behind.write_text(
        configuration.read_text()
        .replace("/pid", "/pid2")
        .replace("listen 80", f"listen 127.0.0.1:{back}")
        .replace(f"proxy_pass http://127.0.0.1:{back};", "return 200 'served\\n';")
    )
    enter = ["sh", "-c", f'echo 0 > {path}/cgroup.procs && exec "$@"', "-"]
    with ExitStack() as stack:
        for command in (
            host.netns.command("nginx", "-c", behind),
            host.netns.command(*enter, "nginx", "-c", configuration),
        ):
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.terminate)
        until("nginx listens", lambda: host.netns.listens(front) and host.netns.listens(back))
        load = subprocess.Popen(
            host.client.command("hey", "-z", "4s", "-c", "4", "-disable-keepalive", f"http://{HOST4}:{front}/"),
            stdout=subprocess.PIPE,
            text=True,
        )
        replaced = 0
        while load.poll() is None:
            assert (
                "replaces the old one"
                in host.graft("attach", "--cgroup", path, "--policy", policies[replaced % 2 - 1]).stdout
            )
            replaced += 1
        assert load.stdout is not None
        said = load.stdout.read()
    assert replaced >= 3
    assert "[200]" in said and "[502]" not in said and "Error distribution" not in said, said
    decisions = host.decisions(ps(host, path)["id"])
    assert decisions[HookDecision.CONNECTED] > 100 and HookDecision.REFUSED_CONNECT not in decisions


def test_a_container_in_a_namespace_of_its_own_is_not_taken_for_a_direct_one(
    host: Host, folder: MakeCgroup, start: Start, netns: Callable[[], Netns]
) -> None:
    path = folder()
    start(path, netns().path)
    said = host.graft("attach", "--cgroup", path, "--transport", "direct", "-i", "*:80=x", status=7).stderr
    assert "direct is impossible: it is in a network namespace of its own" in said
    said = host.graft("attach", "--cgroup", path, "--transport", "swap", "-i", "*:80=x", status=7).stderr
    assert "started without Graft" in said and "graft run" in said
