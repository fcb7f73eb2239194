"""Containers in the host's namespace under a policy that denies what no rule names."""

from __future__ import annotations

import socket

import pytest

from graft.datapath.layout import HookDecision
from tests.e2e.conftest import MakeCgroup, StartPuppet, WritePolicy
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.policies import DENY_ALL, one_endpoint

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("anywhere", "loopback", "beside", "host_address"),
    [("0.0.0.0", "127.0.0.1", CLIENT4, HOST4), ("::", "::1", CLIENT6, HOST6)],
)
def test_with_deny_a_container_binds_and_connects_nowhere_else(
    host: Host,
    make_cgroup: MakeCgroup,
    start_puppet: StartPuppet,
    write_policy: WritePolicy,
    protocol: str,
    anywhere: str,
    loopback: str,
    beside: str,
    host_address: str,
) -> None:
    path, port, family = make_cgroup(), host.port(), 6 if ":" in anywhere else 4
    spec = f"[{host_address}]:{port}" if family == 6 else f"{host_address}:{port}"
    written = f"[{anywhere}]:80" if family == 6 else f"{anywhere}:80"
    host.graft("attach", "--cgroup", path, "--policy", write_policy(one_endpoint(host.endpoint(spec), written)))
    there = host.client.listener(beside)
    here = host.netns.listener(loopback)
    server = start_puppet(path)
    for address, other in ((anywhere, 81), (anywhere, 0), (loopback, 80), (host_address, 80), (anywhere, port)):
        assert server.bind(address, other, protocol) == "EACCES", (address, other)
    for listener in (there, here):
        assert server.connect(listener.getsockname()[0], listener.getsockname()[1], protocol) == "EACCES"
    if protocol == "udp":
        assert server.sendto(beside, 53) == server.sendto(loopback, 53) == "EACCES"
    assert server.bind(anywhere, 80, protocol) == "ok"
    assert host.decisions(host.ps_of(path)["id"])[HookDecision.REFUSED_BIND] >= 5
    there.close()
    here.close()


def test_with_deny_loopback_needs_a_rule_of_its_own(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path = make_cgroup()
    listener = host.netns.listener("127.0.0.1")
    port = listener.getsockname()[1]
    rule = "egress:\n  - to: {}\n    action: container\n"
    host.graft("attach", "--cgroup", path, "--policy", write_policy(DENY_ALL + rule.format("0.0.0.0/0")))
    program = start_puppet(path)
    assert program.connect("127.0.0.1", port) == "EACCES"
    host.graft("attach", "--cgroup", path, "--policy", write_policy(DENY_ALL + rule.format("127.0.0.0/8")))
    assert program.connect("127.0.0.1", port) == "ok"
    listener.close()


def test_a_datagram_socket_may_be_connected_again(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path = make_cgroup()
    egress = f"egress:\n  - to: 127.0.0.0/8\n    endpoint: {host.endpoint('127.0.0.5:dynamic')}\n"
    host.graft("attach", "--cgroup", path, "--policy", write_policy(DENY_ALL + egress))
    program = start_puppet(path)
    sock = program.socket("udp")
    assert [program.say("connect", sock, "127.0.0.1", port) for port in (53, 54)] == ["ok", "ok"]


def test_where_binds_are_denied_an_unbound_listener_gets_no_connection(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path = make_cgroup()
    program = start_puppet(path)
    before = program.socket()
    assert program.say("listen", before) == "ok"
    host.graft("attach", "--cgroup", path, "--policy", write_policy(DENY_ALL))
    after = program.socket()
    assert program.say("listen", after) == "ok"
    assert host.client.reaches(HOST4, program.say("name", before)[1])
    assert not host.client.reaches(HOST4, program.say("name", after)[1], 1)
    assert program.say("option", after, socket.SOL_SOCKET, 62, 0) == "EPERM"  # SO_BINDTOIFINDEX, to untie it


def test_options_that_reach_past_the_policy_are_refused_where_something_is_denied(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    confined_one, free_one = make_cgroup(), make_cgroup()
    host.graft("attach", "--cgroup", confined_one, "--policy", write_policy(DENY_ALL))
    host.graft("attach", "--cgroup", free_one, "-i", f"*:80={host.endpoint('0.0.0.0:dynamic')}")
    for path, result in ((confined_one, "EPERM"), (free_one, "ok")):
        program = start_puppet(path)
        for level, option, value in ((socket.SOL_SOCKET, socket.SO_BINDTODEVICE, "lo"), (socket.SOL_IP, 19, 1)):
            assert program.say("option", program.socket(), level, option, value) == result
        assert program.say("option", program.socket(), socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1) == "ok"
