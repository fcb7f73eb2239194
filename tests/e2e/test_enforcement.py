"""Calls that the hooks refuse, by whatever way a program makes them: they judge the kernel's own copy of an address."""

from __future__ import annotations

import itertools
import os
import platform
import re
import socket
from pathlib import Path

import pytest

from graft.datapath.layout import HookDecision
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.program import Program
from tests.support.wait import until

pytestmark = pytest.mark.e2e

# The trapped call; the 32-bit one by int 0x80, which only x86-64 lets a 64-bit program make; io_uring.
UNTRAPPED = ("32", "u") if platform.machine() == "x86_64" else ("u",)
WAYS = ("", *UNTRAPPED)


def calls(host: Host, programs: Programs, rules: list[str], *steps: str | int) -> list[str]:
    """What tests/programs/calls.c says of each step."""
    return host.run(rules, programs["calls"], *map(str, steps)).stdout.splitlines()


def accepted(listener: socket.socket) -> bool:
    """Whether a connection waits at a listener; takes it."""
    listener.settimeout(0)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def needs_the_call(way: str) -> None:
    """Skips where io_uring has no bind and listen."""
    if way == "u" and tuple(map(int, platform.release().split(".")[:2])) < (6, 11):
        pytest.skip("io_uring has bind and listen from Linux 6.11 on")


def race_is_hit(hit: bool, what: str) -> None:
    """A race that was never hit fails the test, where it can be hit."""
    if not hit and os.cpu_count() == 1:
        pytest.skip(f"{what}: not in reach with one core; what was granted and refused was as it should be")
    assert hit, what


def flipped(host: Host, program: Program) -> tuple[int, int, int]:
    pattern = re.compile(r"succeeded (\d+) refused (\d+) failed (\d+)")
    program.until("a result", lambda: pattern.search(program.said), 60)
    ((succeeded, refused, failed),) = pattern.findall(program.said)
    return int(succeeded), int(refused), int(failed)


def listening_ports(host: Host) -> list[int]:
    lines = host.netns.run("ss", "-Hltn").splitlines()
    return [int(line.split()[3].rsplit(":", 1)[1]) for line in lines]


def test_a_sockaddr_that_flips_during_bind_never_gives_a_forbidden_port(host: Host, programs: Programs) -> None:
    good, bad = host.port(), host.port()
    rules = ["-i", f"0.0.0.0:{good}={host.endpoint(f'0.0.0.0:{good}')}"]
    program = host.start(*rules, "--", programs["flip"], "bind", "3000", "0.0.0.0", good, "0.0.0.0", bad, talk=True)
    succeeded, refused, failed = flipped(host, program)
    assert succeeded + refused == 3000 and failed == 0
    granted = listening_ports(host).count(good)
    assert bad not in listening_ports(host)
    program.tell("\n")
    assert program.wait() == 0
    race_is_hit(granted > 100, "the flip never met the allowed address")
    race_is_hit(succeeded - granted > 100, "the flip never met the other address")


def test_a_flip_during_the_bind_of_a_socket_in_the_hosts_stack_is_refused(host: Host, programs: Programs) -> None:
    good, bad = host.port(), host.port()
    out = host.endpoint("0.0.0.0:dynamic")
    rules = ["-i", f"0.0.0.0:{good}={host.endpoint(f'0.0.0.0:{good}')}", "-e", f"{CLIENT4}/32={out}"]
    program = host.start(*rules, "--", programs["flip"], "rebind", "2000", "0.0.0.0", good, "0.0.0.0", bad, talk=True)
    succeeded, refused, failed = flipped(host, program)
    assert succeeded + refused == 2000 and failed == 0, program.complained
    granted = listening_ports(host).count(good)
    assert bad not in listening_ports(host)
    assert host.decisions(host.container(program).id)[HookDecision.REFUSED_BIND] == refused
    program.tell("\n")
    assert program.wait() == 0
    race_is_hit(granted > 100, "the flip never met the allowed address")
    race_is_hit(refused > 0, "no flip came between the supervisor's look and the kernel's copy")


def test_a_sockaddr_that_flips_during_connect_never_reaches_a_forbidden_destination(
    host: Host, programs: Programs
) -> None:
    allowed, forbidden = host.client.listener(), host.netns.listener()
    rules = ["-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}"]
    good, bad = allowed.getsockname()[1], forbidden.getsockname()[1]
    program = host.start(*rules, "--", programs["flip"], "connect", "4000", CLIENT4, good, HOST4, bad, talk=True)
    reached = itertools.count()

    def done() -> bool:
        """Whether it has made all its calls; a full queue of connections would stop it."""
        while accepted(allowed):
            next(reached)
        return "succeeded" in program.said

    program.until("all calls are made", done, 60)
    succeeded, refused, failed = flipped(host, program)
    assert succeeded >= next(reached)
    assert succeeded + refused + failed == 4000
    assert not accepted(forbidden)
    program.tell("\n")
    assert program.wait() == 0
    allowed.close()
    forbidden.close()
    race_is_hit(succeeded > 100, "the flip never met the allowed address")
    race_is_hit(refused > 0, "no flip came between the supervisor's look and the kernel's copy")


@pytest.mark.parametrize("way", UNTRAPPED)
def test_an_untrapped_bind_stays_in_the_containers_namespace(host: Host, programs: Programs, way: str) -> None:
    needs_the_call(way)
    port = host.port()
    rules = ["-i", f"0.0.0.0:{port}={host.endpoint(f'0.0.0.0:{port}')}"]
    program = host.start(
        *rules,
        "--",
        programs["calls"],
        "socket",
        "4",
        f"bind{way}",
        "0.0.0.0",
        port,
        f"listen{way}",
        "home",
        "wait",
        talk=True,
    )
    said = program.says("home").splitlines()
    assert said[:2] == [f"bind{way} ok", f"listen{way} ok"]
    assert said[2] != f"home {host.netns.cookie}"
    assert not host.netns.listens(port)


@pytest.mark.parametrize("way", UNTRAPPED)
def test_an_untrapped_connect_goes_nowhere_but_in_the_containers_namespace(
    host: Host, programs: Programs, way: str
) -> None:
    listener = host.client.listener()
    rules = ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}"]
    said = calls(host, programs, rules, "socket", 4, f"connect{way}", CLIENT4, listener.getsockname()[1])
    assert said == [f"connect{way} ENETUNREACH"]
    assert not accepted(listener)


@pytest.mark.parametrize("way", WAYS)
def test_a_socket_in_the_hosts_stack_binds_no_port_that_was_not_granted(
    host: Host, programs: Programs, way: str
) -> None:
    needs_the_call(way)
    port = host.port()
    rules = ["-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}"]
    steps: list[str | int] = ["socket", 4, "connect", CLIENT4, 9, "home", f"bind{way}", "0.0.0.0", port, "home"]
    said = calls(host, programs, rules, *steps)
    assert said[:2] == ["connect ECONNREFUSED", f"home {host.netns.cookie}"]
    if way:
        assert said[2:] == [f"bind{way} EACCES", f"home {host.netns.cookie}"]
    else:  # it is moved back to the container's namespace
        assert said[2] == "bind ok" and said[3] != said[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_socket_in_the_hosts_stack_reaches_no_destination_that_was_not_granted(
    host: Host, programs: Programs, way: str
) -> None:
    forbidden = host.netns.listener()
    rules = ["-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}"]
    port = forbidden.getsockname()[1]
    said = calls(host, programs, rules, "socket", 4, "connect", CLIENT4, 9, f"connect{way}", HOST4, port)
    assert said == ["connect ECONNREFUSED", f"connect{way} {'EACCES' if way else 'ENETUNREACH'}"]
    assert not accepted(forbidden)


@pytest.mark.parametrize("way", WAYS)
def test_a_bound_socket_in_the_hosts_stack_reaches_no_destination_that_was_not_granted(
    host: Host, programs: Programs, way: str
) -> None:
    port, forbidden = host.port(), host.netns.listener()
    rules = ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"]
    there = forbidden.getsockname()[1]
    steps = ["socket", 4, "bind", "0.0.0.0", 80, f"connect{way}", HOST4, there, f"connect{way}", "127.0.0.1", there]
    assert calls(host, programs, rules, *steps) == ["bind ok", *[f"connect{way} EACCES"] * 2]
    assert not accepted(forbidden)


def test_listen_on_a_socket_in_the_hosts_stack_with_no_endpoint_is_refused(host: Host, programs: Programs) -> None:
    rules = ["-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}"]
    said = calls(host, programs, rules, "socket", 4, "connect", CLIENT4, 9, "listen")
    assert said == ["connect ECONNREFUSED", "listen EACCES"]


@pytest.mark.parametrize("way", UNTRAPPED)
def test_an_untrapped_listener_with_no_endpoint_refuses_every_client(host: Host, programs: Programs, way: str) -> None:
    needs_the_call(way)
    rules = ["-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}"]
    steps = ["socket", "4", "connect", CLIENT4, "9", f"listen{way}", "option", "1", "62", "name", "wait"]
    program = host.start(*rules, "--", programs["calls"], *steps, talk=True)
    said = program.says("name ").splitlines()
    assert said[1] == f"listen{way} ok"
    assert said[2] in ("option EPERM", "option EACCES")  # SO_BINDTOIFINDEX: it cannot be untied
    port = int(said[3].split()[-1])
    assert host.netns.listens(port)
    for one, address in ((host.client, HOST4), (host.netns, HOST4), (host.netns, "127.0.0.1")):
        with pytest.raises(ConnectionRefusedError):
            one.connected(address, port)


def test_a_taken_endpoint_is_the_kernels_eaddrinuse_and_the_socket_can_be_bound_elsewhere(
    host: Host, programs: Programs
) -> None:
    taken, free = host.netns.listener(), host.port()
    one, other = host.endpoint(f"0.0.0.0:{taken.getsockname()[1]}"), host.endpoint(f"0.0.0.0:{free}")
    rules = ["-i", f"0.0.0.0:80={one}", "-i", f"0.0.0.0:81={other}"]
    said = calls(host, programs, rules, "socket", 4, "bind", "0.0.0.0", 80, "bind", "0.0.0.0", 81, "name", "listen")
    assert said == ["bind EADDRINUSE", "bind ok", "name 0.0.0.0 81", "listen ok"]


def test_a_closed_port_is_the_kernels_econnrefused(host: Host, programs: Programs) -> None:
    rules = ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}", "-e", f"::/0={host.endpoint('[::]:dynamic')}"]
    steps: list[str | int] = []
    for family, address in ((4, CLIENT4), (6, CLIENT6), (6, f"::ffff:{CLIENT4}")):
        steps += ["socket", family, "connect", address, 9]
    assert calls(host, programs, rules, *steps) == ["connect ECONNREFUSED"] * 3


def policy(folder: Path, text: str) -> list[str]:
    file = folder / "policy.yaml"
    file.write_text(text)
    return ["--policy", str(file)]


@pytest.mark.parametrize("way", WAYS)
def test_default_deny_refuses_what_no_rule_names(host: Host, programs: Programs, tmp_path: Path, way: str) -> None:
    needs_the_call(way)
    port = host.port()
    rules = policy(
        tmp_path,
        f"name: t\nendpoints: {{web: 0.0.0.0:{port}}}\ningress: [{{bind: 0.0.0.0:80, endpoint: web}}]\ndefault: deny\n",
    )
    steps: list[str | int] = ["socket", 4, "bind", "0.0.0.0", 80, "listen"]
    for family, call, address, refused in (
        (4, "bind", "0.0.0.0", 81),
        (4, "bind", "127.0.0.1", 80),
        (6, "bind", "::1", 80),
        (4, "connect", "127.0.0.1", 80),
        (6, "connect", "::1", 80),
        (4, "connect", CLIENT4, 80),
    ):
        steps += ["socket", family, f"{call}{way}", address, refused]
    said = calls(host, programs, rules, *steps)
    assert said[:2] == ["bind ok", "listen ok"]
    assert said[2:] == [f"bind{way} EACCES"] * 3 + [f"connect{way} EACCES"] * 3


@pytest.mark.parametrize("way", WAYS)
def test_a_denied_destination_is_eacces_and_what_is_around_it_is_reached(
    host: Host, programs: Programs, tmp_path: Path, way: str
) -> None:
    open_, closed = host.client.listener(), host.client.listener()
    rules = policy(
        tmp_path,
        "name: t\nendpoints: {out: 0.0.0.0:dynamic}\negress:\n"
        f"  - {{to: {CLIENT4}, ports: [{closed.getsockname()[1]}], action: deny}}\n"
        "  - {to: 0.0.0.0/0, endpoint: out}\n",
    )
    inside, outside = closed.getsockname()[1], open_.getsockname()[1]
    steps = ["socket", 4, "connect", CLIENT4, outside, "peer", "socket", 4, f"connect{way}", CLIENT4, inside]
    steps += ["socket", 6, f"connect{way}", f"::ffff:{CLIENT4}", inside]
    said = calls(host, programs, rules, *steps)
    assert said == ["connect ok", f"peer {CLIENT4} {outside}", *[f"connect{way} EACCES"] * 2]
    assert not accepted(closed)


def test_options_that_reach_past_the_policy_are_refused_in_the_hosts_stack(host: Host, programs: Programs) -> None:
    port = host.port()
    rules = ["-i", f"[::]:80={host.endpoint(f'[::]:{port}')}"]
    # SO_BINDTODEVICE, SO_MARK, SO_BINDTOIFINDEX, IP_TRANSPARENT, IP_OPTIONS, IPV6_TRANSPARENT, joining groups
    refused = [(1, 25), (1, 36), (1, 62), (0, 19), (0, 4), (41, 75), (0, 35), (41, 20)]
    steps: list[str | int] = ["socket", 6, "bind", "::", 80]
    for level, name in refused:
        steps += ["text", level, name, "lo"]
    said = calls(host, programs, rules, *steps, "option", 6, 1)
    assert said[0] == "bind ok"
    assert set(said[1:-1]) <= {"text EPERM", "text EACCES"}
    assert said[-1] == "option ok"  # TCP_NODELAY reaches past no policy


def test_a_program_of_roots_has_no_cap_net_admin_unless_it_is_allowed(host: Host) -> None:
    capability = 1 << 12
    for options, wanted in (([], False), (["--allow-net-admin"], True)):
        status = host.run(options, "cat", "/proc/self/status").stdout
        sets = {name: int(value, 16) for name, value in re.findall(r"^(Cap\w+):\t(\w+)$", status, re.M)}
        assert bool(sets["CapEff"] & capability) is wanted
        assert bool(sets["CapBnd"] & capability) is wanted


def test_a_port_below_1024_needs_no_capability_where_it_is_granted(host: Host, programs: Programs) -> None:
    rules = ["-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:81')}", "--user", "nobody"]
    said = calls(host, programs, rules, "socket", 4, "bind", "0.0.0.0", 80, "socket", 4, "bind", "0.0.0.0", 82)
    assert said == ["bind ok", "bind EACCES"]  # the second one is the kernel's own


def test_a_namespace_that_the_program_makes_is_its_own(host: Host, programs: Programs) -> None:
    port = host.port()
    rules = ["-i", f"0.0.0.0:{port}={host.endpoint(f'0.0.0.0:{port}')}"]
    program = host.start(
        *rules,
        "--",
        programs["calls"],
        "netns",
        "socket",
        "4",
        "bind",
        "0.0.0.0",
        port,
        "listen",
        "home",
        "wait",
        talk=True,
    )
    said = program.says("home").splitlines()
    assert said[1:3] == ["bind ok", "listen ok"]
    assert said[3] != f"home {host.netns.cookie}"
    assert not host.netns.listens(port)


def test_detaching_takes_effect_at_the_next_call(host: Host, programs: Programs) -> None:
    port, listener = host.port(), host.client.listener()
    rules = [
        "-i",
        f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}",
        "-e",
        f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}",
    ]
    steps = ["socket", "4", "connect", CLIENT4, "9", "wait", "connect", CLIENT4, listener.getsockname()[1]]
    program = host.start(*rules, "--", programs["calls"], *steps, talk=True)
    program.says("connect")
    host.remove(host.container(program))
    program.tell("\n")
    assert program.wait() == 0
    assert program.said.splitlines()[1] == "connect EACCES"
    assert not accepted(listener)


def test_another_process_of_the_host_is_never_touched(host: Host, tmp_path: Path) -> None:
    port = host.port()
    rules = policy(
        tmp_path,
        f"name: t\nendpoints: {{web: 0.0.0.0:{port}}}\ningress: [{{bind: '*:80', endpoint: web}}]\ndefault: deny\n",
    )
    program = host.start(*rules, "--", "sleep", "60")
    until("the container", lambda: list(host.settings.run_dir.glob("containers/*.json")))
    listener = host.netns.listener(HOST6, 80)
    assert host.netns.listens(80)
    host.client.connected(HOST6, 80).close()
    assert listener.getsockname()[:2] == (HOST6, 80)
    listener.close()
    program.stop()
