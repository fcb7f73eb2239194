"""Binds of port 0, and ranges of ports: under `graft run`, attached, and by a relay."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeCgroup, WritePolicy
from tests.support.building import Programs
from tests.support.cgroups import in_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4, HOST6
from tests.support.plain import Plain
from tests.support.program import Program
from tests.support.shell import Word

pytestmark = pytest.mark.e2e

PYTHON = ["/usr/bin/python3", "-ISuc"]


def port_0(host: Host) -> list[str]:
    """A rule for binds of port 0 to 0.0.0.0."""
    return ["-i", f"0.0.0.0:0={host.endpoint('0.0.0.0:dynamic')}"]


def told_port(program: Program, pattern: str) -> int:
    """The port that a program tells others."""
    found = program.until(f"{pattern} in the output", lambda: re.search(pattern, program.said))
    assert found is not None
    return int(found[1])


def test_a_server_in_python_tells_the_port_at_which_it_is_reached(host: Host, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("python\n")
    program = host.start(
        *port_0(host), "--", "/usr/bin/python3", "-um", "http.server", "0", "-b", "0.0.0.0", "-d", tmp_path
    )
    assert host.client.fetch(HOST4, told_port(program, r"port (\d+)")) == "python\n"


def test_a_server_in_node_tells_the_port_at_which_it_is_reached(host: Host) -> None:
    script = (
        "const s = require('http').createServer((_, answer) => answer.end('node'));\n"
        "s.listen(0, '0.0.0.0', () => console.log('port', s.address().port));\n"
    )
    program = host.start(*port_0(host), "--", "node", "-e", script)
    assert host.client.fetch(HOST4, told_port(program, r"port (\d+)")) == "node"


def test_a_dual_stack_server_in_node_is_reached_by_ipv4_and_ipv6_where_its_endpoint_has_both(host: Host) -> None:
    script = (
        "const s = require('http').createServer((_, answer) => answer.end('node'));\n"
        "s.listen(0, () => console.log('port', s.address().port));\n"
    )
    name = host.endpoint("[::]:dynamic", dual_stack=True)
    port = told_port(host.start("-i", f"[::]:0={name}", "--", "node", "-e", script), r"port (\d+)")
    assert host.client.fetch(HOST4, port) == host.client.fetch(HOST6, port) == "node"


def test_a_server_in_go_listens_on_a_port_of_the_host(host: Host, tmp_path: Path) -> None:
    (tmp_path / "hooks.json").write_text(
        json.dumps([{"id": "h", "execute-command": "/bin/true", "response-message": "go"}])
    )
    words: list[Word] = ["-hooks", tmp_path / "hooks.json", "-ip", "0.0.0.0", "-port", "0"]
    program = host.start(*port_0(host), "--", "webhook", *words)
    (listening,) = program.until(
        "webhook", lambda: re.findall(r":(\d+) ", host.netns.run("ss", "-Hltnp", "state", "listening"))
    )[:1]
    assert host.client.fetch(HOST4, int(listening), "/hooks/h") == "go"


MPTCP_SERVER = """
import socket
listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
listener.bind(("0.0.0.0", 0))
listener.listen()
print("port", listener.getsockname()[1], flush=True)
connection, peer = listener.accept()
connection.sendall(repr(connection.getsockname()).encode())
connection.close()
"""


def test_an_mptcp_server_tells_the_port_at_which_it_is_reached(host: Host) -> None:
    port = told_port(host.start(*port_0(host), "--", "/usr/bin/python3", "-c", MPTCP_SERVER), r"port (\d+)")
    with closing(host.client.connected(HOST4, port)) as client:
        assert client.recv(100) == repr((HOST4, port)).encode()


def test_many_sockets_of_port_0_have_ports_of_their_own(host: Host) -> None:
    script = (
        "import socket\n"
        "made = [socket.create_server(('0.0.0.0', 0)) for _ in range(50)]\n"
        "print(*(one.getsockname()[1] for one in made)); input()\n"
    )
    program = host.start(*port_0(host), "--", *PYTHON, script, talk=True)
    ports = {int(word) for word in program.until("the ports", lambda: program.said).split()}
    assert len(ports) == 50 and all(host.netns.listens(port) for port in ports)


def test_loopback_stays_the_containers_where_the_rule_names_0000(host: Host) -> None:
    script = (
        "import socket\n"
        "own = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(own.getsockname()).close(); print('reached')\n"
    )
    assert host.run(port_0(host), *PYTHON, script).stdout == "reached\n"


def test_a_bind_of_port_0_survives_the_supervisors_death(host: Host) -> None:
    """A call that was being served is completed by the next supervisor, and the port stays the one that it got."""
    script = (
        "import socket\n"
        "for number in range(300):\n"
        "    with socket.socket() as one:\n"
        "        one.bind(('0.0.0.0', 0)); one.listen(); first = one.getsockname()\n"
        "        assert first == one.getsockname() and first[1]\n"
        "        socket.create_connection(('HOST', first[1]), 20).close(); one.accept()[0].close()\n"
        "    print(number)\n"
    ).replace("HOST", HOST4)
    out = ["-e", f"{HOST4}/32={host.endpoint('0.0.0.0:dynamic')}"]
    program = host.start(*port_0(host), *out, "--", *PYTHON, script)
    killed: set[int] = set()
    for number in (30, 90, 150, 210):
        program.until(f"{number} binds", lambda number=number: f"{number}\n" in program.said)  # type: ignore[misc]
        victim = program.until("a supervisor", lambda: next(iter({host.supervisor_or_0(program)} - killed - {0}), 0))
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
    assert program.wait(60) == 0, program.complained


def test_with_v_and_in_ps_the_port_that_a_socket_got_is_shown(host: Host, programs: Programs) -> None:
    first = host.ports(3)
    any_, rtp = host.endpoint("0.0.0.0:dynamic"), host.endpoint(f"0.0.0.0:{first}-{first + 2}")
    steps = ["socket", "4", "bind", "0.0.0.0", "0", "listen", "name", "socket", "4", "bind", "0.0.0.0", "5001"]
    rules = ["-v", "-i", f"*:0={any_}", "-i", f"*:5000-5002={rtp}"]
    program = host.start(*rules, "--", programs["calls"], *steps, "listen", "wait", talk=True)
    port = told_port(program, r"name 0\.0\.0\.0 (\d+)")
    program.until("the log", lambda: program.complained.count("listen") == 2)
    assert f"bind 0.0.0.0:0 -> {any_} = 0.0.0.0:{port}\n" in program.complained
    assert f"bind 0.0.0.0:5001 -> {rtp} = 0.0.0.0:{first + 1}\n" in program.complained
    (found,) = [one for one in host.ps() if one["id"] == host.container(program).id]
    shown = {(one["local"], one["endpoint"], one["asked"]) for one in found["sockets"]}
    assert shown == {(f"0.0.0.0:{port}", any_, "0.0.0.0:0"), (f"0.0.0.0:{first + 1}", rtp, "0.0.0.0:5001")}
    in_force = host.graft("policy", "show", found["name"]).stdout
    assert f"ingress any * (IPv4):0 -> {any_} = 0.0.0.0:dynamic\n" in in_force
    assert f"ingress any * (IPv4):5000-5002 -> {rtp} = 0.0.0.0:{first}-{first + 2}\n" in in_force


def test_rules_around_a_hole_are_shown_with_the_ports_that_they_become(host: Host) -> None:
    rtp, other = host.endpoint("0.0.0.0:20000-20009"), host.endpoint("0.0.0.0:8080")
    program = host.start("-i", f"*:5000-5009={rtp}", "-i", f"*:5004={other}", "--", "sh", "-c", "echo up; sleep 1000")
    program.says("up")
    name = host.container(program).name
    shown = [line for line in host.graft("policy", "show", name).stdout.splitlines() if "* (IPv4)" in line]
    assert shown == [
        f"  ingress any * (IPv4):5000-5003 -> {rtp} = 0.0.0.0:20000-20003",
        f"  ingress any * (IPv4):5004 -> {other} = 0.0.0.0:8080",
        f"  ingress any * (IPv4):5005-5009 -> {rtp} = 0.0.0.0:20005-20009",
    ]


@pytest.mark.parametrize("command", ["check", "run", "apply"])
def test_sizes_that_differ_are_refused_with_field_and_line(
    host: Host, make_cgroup: MakeCgroup, write_policy: WritePolicy, command: str
) -> None:
    text = "name: p\nendpoints: {rtp: '0.0.0.0:20000-20100'}\ningress:\n  - {bind: '*:5000-5099', endpoint: rtp}\n"
    file, path = write_policy(text), make_cgroup()
    host.graft("attach", "--cgroup", path, "-i", f"*:80={host.endpoint('0.0.0.0:dynamic')}")
    commands: dict[str, list[Word]] = {
        "check": ["policy", "check", file],
        "run": ["run", "--policy", file, "--", "true"],
        "apply": ["policy", "apply", file, "--cgroup", path],
    }
    result = host.graft(*commands[command], status=2)
    assert f"{file}:4: ingress[0].bind: *:5000-5099 has 100 ports, the endpoint rtp (0.0.0.0:20000-20100) 101" in (
        result.stdout + result.stderr
    )


# FTP tells its client the port at which it waits for data: the endpoint has the same ports.

VSFTPD = """\
listen=YES
listen_port=21
background=NO
anonymous_enable=YES
anon_root={folder}
local_enable=NO
no_anon_password=YES
xferlog_enable=NO
seccomp_sandbox=NO
pasv_min_port={first}
pasv_max_port={last}
"""


@pytest.fixture
def ftp_folder() -> Iterator[Path]:
    """A folder that the user ftp may read, with a file."""
    with tempfile.TemporaryDirectory(prefix="graft-ftp-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        (path / "file").write_bytes(os.urandom(200_000))
        yield path


@pytest.mark.parametrize("mode", ["epsv", "pasv"])
def test_vsftpd_serves_passive_clients_through_a_range(host: Host, ftp_folder: Path, mode: str) -> None:
    assert shutil.which("vsftpd"), "make setup"
    port, first = host.port(), host.ports(8)
    last = first + 7
    config = ftp_folder.with_suffix(".conf")
    config.write_text(VSFTPD.format(folder=ftp_folder, first=first, last=last))
    rules = [f"0.0.0.0:21={host.endpoint(f'0.0.0.0:{port}')}"]
    rules.append(f"*:{first}-{last}={host.endpoint(f'0.0.0.0:{first}-{last}')}")
    try:
        program = host.start("-v", *(word for rule in rules for word in ("-i", rule)), "--", "vsftpd", config)
        program.until("vsftpd", lambda: host.netns.listens(port))
        words = ["--disable-epsv"] if mode == "pasv" else []
        for number in range(4):
            got = ftp_folder.with_suffix(f".{number}")
            try:
                host.client.run("curl", "-sS", "--max-time", "60", *words, "-o", got, f"ftp://{HOST4}:{port}/file")
                assert got.read_bytes() == (ftp_folder / "file").read_bytes()
            finally:
                got.unlink(missing_ok=True)
        assert "file" in host.client.run("curl", "-sS", "--max-time", "60", *words, f"ftp://{HOST4}:{port}/")
        used = {int(port) for port in re.findall(r"-> e\d+ = 0\.0\.0\.0:(\d+)\n", program.complained)}
        assert port in used and used & set(range(first, last + 1)), program.complained
    finally:
        config.unlink()


RTP = """
import socket, select
made = []
for port in range(5000, 5008, 2):
    for one in (port, port + 1):
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0", one))
        made.append(sock)
print("ready", [one.getsockname()[1] for one in made])
while True:
    for sock in select.select(made, [], [])[0]:
        data, peer = sock.recvfrom(2000)
        sock.sendto(b"%d " % sock.getsockname()[1] + data, peer)
"""


def test_rtp_sessions_have_their_pairs_of_ports(host: Host, make_cgroup: MakeCgroup) -> None:
    """Direct: a session's data has an even port, and its control the next one."""
    first, path = host.ports(8), make_cgroup()
    host.graft("attach", "--cgroup", path, "-i", f"*:5000-5007={host.endpoint(f'0.0.0.0:{first}-{first + 7}', 'udp')}")
    program = host.start_command([*in_cgroup(path), *host.netns.command(*PYTHON, RTP)])
    program.says(f"ready {list(range(5000, 5008))}")
    with host.client.inside(), closing(socket.socket(type=socket.SOCK_DGRAM)) as client:
        client.bind((CLIENT4, 0))
        client.settimeout(10)
        for number in range(8):
            client.sendto(b"packet", (HOST4, first + number))
            assert client.recvfrom(100) == (b"%d packet" % (5000 + number), (HOST4, first + number))
    shown = {one["local"]: one["asked"] for one in host.ps_of(path)["sockets"]}
    assert shown == {f"0.0.0.0:{first + number}": f"0.0.0.0:{5000 + number}" for number in range(8)}


def test_a_connection_under_graft_run_leaves_from_a_range(host: Host, programs: Programs) -> None:
    first, listener = host.ports(4), host.client.listener()
    rules = ["-e", f"0.0.0.0/0={host.endpoint(f'{HOST4}:{first}-{first + 3}')}"]
    steps = ["socket", "4", "connect", CLIENT4, str(listener.getsockname()[1])]
    said = host.run(rules, programs["calls"], *steps * 5).stdout.split("\n")
    assert said[:5] == ["connect ok"] * 4 + ["connect EADDRNOTAVAIL"]
    assert {listener.accept()[1][1] for _ in range(4)} == set(range(first, first + 4))
    listener.close()


# A relay publishes port by port, and no bind of port 0.


def test_the_relay_publishes_a_range_port_by_port(container: Plain) -> None:
    host, first = container.host, container.host.ports(4)
    with container.listener(port=5001) as one, container.listener(port=5003) as other:
        container.attach("-i", f"*:5000-5003={host.endpoint(f'0.0.0.0:{first}-{first + 3}')}")
        for listener, port in ((one, first + 1), (other, first + 3)):
            with closing(host.client.connected(HOST4, port)) as client:
                accepted, peer = listener.accept()
                with accepted:
                    assert peer == client.getsockname()
        assert not host.netns.listens(first) and not host.netns.listens(first + 2)
        with container.listener(port=5000):
            container.until_published(first)
        container.until_published(first, False)
        assert host.netns.listens(first + 1)


def test_the_relay_connects_from_a_range(container: Plain) -> None:
    host, first = container.host, container.host.ports(4)
    container.attach("-e", f"{CLIENT4}/32={host.endpoint(f'{HOST4}:{first}-{first + 3}')}")
    with closing(host.client.listener()) as listener:
        for _ in range(3):
            with container.tcp() as sock:
                sock.connect((CLIENT4, listener.getsockname()[1]))
                accepted, peer = listener.accept()
                accepted.close()
                assert peer[0] == HOST4 and first <= peer[1] < first + 4


def test_the_relay_refuses_a_rule_for_port_0(container: Plain, write_policy: WritePolicy) -> None:
    host = container.host
    name = host.endpoint("0.0.0.0:dynamic")
    refused = host.graft("attach", "--cgroup", container.cgroup, "-i", f"*:0={name}", status=2)
    assert refused.stderr.count("\n") == 1 and f"-i *:0={name}: transport splice cannot publish" in refused.stderr
    container.attach("-i", f"*:80={name}")
    file = write_policy(f"name: p\ningress:\n  - bind: '*:0'\n    endpoint: {name}\n")
    refused = host.graft("policy", "apply", file, "--cgroup", container.cgroup, status=2)
    assert ":3: ingress[0].bind: transport splice cannot publish" in refused.stderr


def test_endpoints_that_overlap_are_a_matter_of_who_binds_first(host: Host, programs: Programs) -> None:
    first = host.ports(4)
    rtp, one = host.endpoint(f"0.0.0.0:{first}-{first + 3}"), host.endpoint(f"0.0.0.0:{first + 2}")
    rules = ["-i", f"*:5000-5003={rtp}", "-i", f"*:80={one}"]
    steps = ["socket", "4", "bind", "0.0.0.0", "80", "listen", "name"]
    steps += ["socket", "4", "bind", "0.0.0.0", "5002", "bind", "0.0.0.0", "5003", "name"]
    said = host.run(rules, programs["calls"], *steps).stdout.splitlines()
    assert said == ["bind ok", "listen ok", "name 0.0.0.0 80", "bind EADDRINUSE", "bind ok", "name 0.0.0.0 5003"]
