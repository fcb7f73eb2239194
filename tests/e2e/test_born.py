"""Transport born: every socket of the container is on the host's stack from socket(2) on."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from graft.model.transport import Transport
from graft.swap import fast_calls
from tests.support.building import Programs
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, HOST4, HOST6
from tests.support.shell import Word
from tests.support.wait import until

pytestmark = pytest.mark.e2e

PYTHON = ("/usr/bin/python3", "-ISc")


@pytest.fixture(params=["compiled", "plain"])
def host(host: Host, request: pytest.FixtureRequest) -> Host:
    """The host, where every `graft run` has transport born, answered by the compiled part or by plain Python alone."""
    born = host.with_transport("born")
    if request.param == "plain":
        return replace(born, environment={**born.environment, fast_calls.NOT_COMPILED: "1"})
    if reason := fast_calls.why_not(Transport.BORN):
        pytest.skip(reason)
    return born


def is_compiled(host: Host) -> bool:
    return fast_calls.NOT_COMPILED not in host.environment


def web_rule(host: Host, address: str = "0.0.0.0") -> tuple[list[str], int]:
    port = host.port()
    return ["-i", f"*:80={host.endpoint(f'{address}:{port}')}"], port


def out_rule(host: Host) -> list[str]:
    return ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}"]


def test_ps_and_the_log_say_which_transport_serves(host: Host) -> None:
    rules, _ = web_rule(host)
    script = "import socket; s = socket.socket(); s.bind(('', 80)); s.listen(); print('ready', flush=True); input()"
    program = host.start("-v", *rules, "--", *PYTHON, script, talk=True)
    program.says("ready")
    assert [one["transport"] for one in host.ps()] == ["born"]
    assert "socket inet stream: on the host's stack" in program.complained
    assert "bind" not in program.complained and "listen" not in program.complained


def test_a_socket_has_its_flags_and_its_kind_from_the_start(host: Host) -> None:
    script = (
        "import fcntl, os, socket\n"
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "for family in (2, 10):\n"
        "    for kind, protocols in ((1, (0, 6, 262)), (2, (0, 17))):\n"
        "        for protocol in protocols:\n"
        "            for flags in (0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC):\n"
        "                fd = libc.socket(family, kind | flags, protocol)\n"
        "                s = socket.socket(fileno=fd)\n"
        "                print(s.family, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK,\n"
        "                      fcntl.fcntl(fd, fcntl.F_GETFD), s.getsockopt(1, 3), s.getsockopt(1, 38))\n"
    )
    grafted = host.run(web_rule(host)[0], *PYTHON, script).stdout
    assert grafted == host.netns.run(*PYTHON, script)
    assert len(grafted.splitlines()) == 30


ERRORS = """
import ctypes, errno, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)
def attempt(*kind):
    fd = libc.socket(*kind)
    print(errno.errorcode[ctypes.get_errno()] if fd < 0 else "made")
    if fd >= 0:
        os.close(fd)
for _ in range(40):
    attempt(2, 1, 0)
attempt(2, 1, 17)
attempt(2, 2, 6)
attempt(2, 9, 0)
attempt(2, 1 | 0x100, 0)
attempt(99, 1, 0)
attempt(1, 1, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
attempt(2, 1, 0)
os.close(held.pop())
attempt(2, 1, 0)
"""


def test_sockets_own_errors_are_the_kernels(host: Host) -> None:
    grafted = host.run(web_rule(host)[0], *PYTHON, ERRORS).stdout
    assert grafted == host.netns.run(*PYTHON, ERRORS)
    assert grafted.split()[-2:] == ["EMFILE", "made"]


def test_a_udp_server_answers_its_client(host: Host) -> None:
    rules, port = web_rule(host)
    script = (
        "import socket\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 80))\n"
        "print(s.getsockname(), flush=True)\n"
        "data, peer = s.recvfrom(100); print(peer[0], flush=True); s.sendto(data.upper(), peer)\n"
    )
    # It answers whoever asks: a server needs the rule that lets it.
    program = host.start(*rules, *out_rule(host), "--", *PYTHON, script)
    program.says("('0.0.0.0', 80)")
    with host.client.inside():
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(20)
        client.connect((HOST4, port))
        client.send(b"query")
        assert client.recv(100) == b"QUERY"
    assert program.wait() == 0
    assert program.said.splitlines()[1] == CLIENT4


def test_the_last_close_is_the_programs(host: Host) -> None:
    """Its peer sees the end of each connection at once, though the supervisor had the socket too."""
    listener = host.client.listener("0.0.0.0")
    listener.settimeout(20)
    script = (
        "import socket, sys\n"
        "for _ in range(40):\n"
        f"    s = socket.create_connection(('{CLIENT4}', {listener.getsockname()[1]})); s.close()\n"
        "    print('closed', flush=True); input()\n"
    )
    program = host.start(*out_rule(host), "--", *PYTHON, script, talk=True)
    with listener:
        for _ in range(40):
            peer, _ = listener.accept()
            peer.settimeout(20)
            assert peer.recv(1) == b""
            peer.close()
            program.tell("\n")
    assert program.wait() == 0


def test_a_socket_belongs_to_the_user_that_made_it(host: Host) -> None:
    script = (
        "import os, socket\n"
        "def owner(): s = socket.socket(); status = os.fstat(s.fileno()); return status.st_uid, status.st_gid\n"
        "def owners(): return {owner() for _ in range(40)}\n"
        "print(owners()); os.setegid(7); os.seteuid(5); print(owners())\n"
        "os.seteuid(0); os.setegid(0); print(owners()); os.setegid(7); print(owners())\n"
        "os.setgid(9); os.setuid(8); print(owners())\n"
    )
    said = host.run(web_rule(host)[0], *PYTHON, script).stdout.splitlines()
    assert said == ["{(0, 0)}", "{(5, 7)}", "{(0, 0)}", "{(0, 7)}", "{(8, 9)}"]


def test_a_namespace_that_the_program_enters_has_its_own_sockets(host: Host) -> None:
    script = (
        "import ctypes, os, socket, struct, fcntl\n"
        "def cookie(): return struct.unpack('Q', socket.socket().getsockopt(1, 71, 8))[0]\n"
        "def cookies(): return ' '.join(map(str, {cookie() for _ in range(40)}))\n"
        "before = os.open('/proc/self/ns/net', 0); setns = ctypes.CDLL(None).setns\n"
        "print(cookies()); ctypes.CDLL(None).unshare(0x40000000); print(cookies())\n"
        "setns(before, 0); print(cookies())\n"
    )
    first, second, third = host.run(web_rule(host)[0], *PYTHON, script).stdout.splitlines()
    assert int(first) == int(third) == host.netns.cookie
    assert int(second) != int(first)


def test_what_is_not_granted_is_refused_and_no_call_of_the_data_path_is_trapped(host: Host, programs: Programs) -> None:
    rules, _ = web_rule(host)
    steps: list[Word] = [
        "socket",
        4,
        "bind",
        "0.0.0.0",
        81,
        "connect",
        CLIENT4,
        9,
        "bind",
        "0.0.0.0",
        80,
        "listen",
        "name",
        "home",
    ]
    said = host.run(["-v", *rules], programs["calls"], *steps)
    assert said.stdout.splitlines()[-2:] == ["name 0.0.0.0 80", f"home {host.netns.cookie}"]
    trapped = [line.split()[1] for line in said.stderr.splitlines() if line.startswith("graft: ")]
    assert set(trapped) == {"socket"}


def policy(name: str, port: int, more: str = "", default: str = "{bind: deny, connect: deny}") -> str:
    return (
        f"name: {name}\nendpoints: {{web: '0.0.0.0:{port}'}}\n"
        f"ingress: [{{bind: '*:80', endpoint: web}}]\n{more}default: {default}\n"
    )


@pytest.mark.parametrize(
    ("more", "default", "said"),
    [
        ("egress: [{to: 10.0.0.0/8, action: container}]\n", "{bind: deny, connect: deny}", "egress[0]"),
        ("", "{bind: deny}", "default.connect"),
        ("", "{connect: deny}", "default.bind"),
    ],
)
def test_a_policy_that_leaves_something_inside_is_refused_for_a_running_container(
    host: Host, tmp_path: Path, more: str, default: str, said: str
) -> None:
    port = host.port()
    file = tmp_path / "policy.yaml"
    file.write_text(policy("p", port))
    program = host.start_command(
        [GRAFT, "run", "--policy", file, "--", *PYTHON, "print('ready', flush=True); input()"], talk=True
    )
    program.says("ready")
    other = tmp_path / "other.yaml"
    other.write_text(policy("p", port, more, default))
    refused = host.graft("policy", "apply", other, status=None)
    assert refused.returncode and said in refused.stderr and "start it again" in refused.stderr
    file.write_text(policy("p", host.port()))
    host.graft("policy", "apply", file)


def test_a_dual_stack_server_is_served_where_its_endpoint_is(host: Host) -> None:
    port = host.port()
    rule = f"*:80={host.endpoint(f'[::]:{port}', dual_stack=True)}"
    script = (
        "import socket\n"
        "s = socket.create_server(('::', 80), family=socket.AF_INET6, dualstack_ipv6=True)\n"
        "print('ready', flush=True)\n"
        "for _ in range(2): c, peer = s.accept(); c.send(peer[0].encode()); c.close()\n"
    )
    program = host.start("-i", rule, "--", *PYTHON, script)
    program.says("ready")
    for address in (HOST4, HOST6):
        with host.client.connected(address, port) as sock:
            assert sock.recv(100)


def test_swap_serves_where_an_ipv6_endpoint_needs_it(host: Host) -> None:
    rule = f"[::]:80={host.endpoint(f'[::]:{host.port()}')}"
    program = host.start("-i", rule, "--", *PYTHON, "print('ready', flush=True); input()", talk=True)
    program.says("ready")
    assert json.loads(host.graft("ps", "--json").stdout)[0]["transport"] == "swap"


def spare_sockets(pid: int) -> int:
    return len([fd for fd in links(pid) if fd.startswith("socket:")])


def has_spares(pid: int) -> bool:
    return spare_sockets(pid) > 4


def links(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.append(os.readlink(entry))
    return found


MAKES = "import socket\ndef make(n):\n    for _ in range(n): socket.socket().close()\n"


def test_the_compiled_part_knows_the_threads_that_were_served_and_plain_python_does_without(host: Host) -> None:
    script = MAKES + "make(60); print('made', flush=True); input()"
    program = host.start(*web_rule(host)[0], "--", *PYTHON, script, talk=True)
    program.says("made")
    known = [link for link in links(host.supervisor(program)) if link == f"/proc/{program.child()}/ns/net"]
    assert len(known) == is_compiled(host)


def test_threads_users_and_kinds_cost_a_bounded_number_of_descriptors(host: Host) -> None:
    script = (
        "import os, socket, threading\n"
        "def make():\n"
        "    for family in (2, 10):\n"
        "        for kind in (1, 2, 1 | socket.SOCK_NONBLOCK): socket.socket(family, kind).close()\n"
        "def many(count):\n"
        "    threads = [threading.Thread(target=make) for _ in range(count)]\n"
        "    for thread in threads: thread.start()\n"
        "    for thread in threads: thread.join()\n"
        "for _ in range(20): many(30)\n"
        "for user in range(1, 60): os.seteuid(user); make(); make(); os.seteuid(0)\n"
        "print('made', flush=True); input()\n"
    )
    program = host.start(*web_rule(host)[0], "--", *PYTHON, script, talk=True)
    program.says("made", timeout=60)
    supervisor = host.supervisor(program)
    assert spare_sockets(supervisor) <= 80
    assert len(links(supervisor)) < 1024


def test_many_threads_at_once_get_sockets_of_the_hosts_stack(host: Host) -> None:
    script = (
        "import socket, struct, threading\n"
        "found = []\n"
        "def make():\n"
        "    for _ in range(100):\n"
        "        with socket.socket() as s: found.append(struct.unpack('Q', s.getsockopt(1, 71, 8))[0])\n"
        "threads = [threading.Thread(target=make) for _ in range(40)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(len(found), *set(found))\n"
    )
    said = host.run(web_rule(host)[0], *PYTHON, script).stdout.split()
    assert said == ["4000", str(host.netns.cookie)]


def killed_again_and_again(host: Host, script: str) -> str:
    """What a program said that makes sockets while its supervisors are killed, five of them."""
    program = host.start(*web_rule(host)[0], "--", *PYTHON, script, talk=True)
    program.says("ready")
    killed: set[int] = set()
    for _ in range(5):
        victim = program.until("a supervisor", lambda: next(iter({host.supervisor_or_0(program)} - killed - {0}), 0))
        until("serving", partial(has_spares, victim))
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
    program.tell("\n")
    assert program.wait() == 0, program.complained
    return program.said


def test_supervisors_killed_while_they_serve_cost_no_call(host: Host) -> None:
    script = (
        "import socket, struct, sys, threading\n"
        "cookies, count, stop = set(), 0, threading.Event()\n"
        "threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "while count < 10 or not stop.is_set():\n"
        "    with socket.socket() as s: cookies.add(struct.unpack('Q', s.getsockopt(1, 71, 8))[0])\n"
        "    count += 1\n"
        "print(*cookies)\n"
    )
    said = killed_again_and_again(host, script)
    assert said.splitlines()[-1] == str(host.netns.cookie)


def test_a_program_that_never_stops_making_sockets_ends_with_graft_run(host: Host) -> None:
    script = "import socket\nprint('ready', flush=True)\nwhile True: socket.socket().close()"
    program = host.start(*web_rule(host)[0], "--", *PYTHON, script)
    program.says("ready")
    supervisor = host.supervisor(program)
    program.process.kill()
    program.process.wait()
    until("the supervisor has ended", lambda: not Path(f"/proc/{supervisor}").exists())
    until("nothing is left", lambda: not host.leftovers())
