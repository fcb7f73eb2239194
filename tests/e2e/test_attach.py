"""Containers that run already, in the host's namespace: what `graft attach` finds, says and serves."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.e2e.conftest import MakeCgroup, StartPuppet, WritePolicy
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6, Netns
from tests.support.policies import DENY_ALL

pytestmark = pytest.mark.e2e

NOBODY = 65534


def test_two_containers_on_one_port_are_served_on_two_endpoints(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    ports = host.port(), host.port()
    servers = []
    for port in ports:
        path = make_cgroup()
        host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}")
        server = start_puppet(path, user=NOBODY)
        listener = server.listener("0.0.0.0", 80)
        assert server.say("name", listener) == ["0.0.0.0", 80]
        servers.append((server, listener, port))
    for server, listener, port in servers:
        with host.client.connected(HOST4, port) as connection:
            peer = server.say("answer", listener, f"port {port}")
            assert peer[0] == CLIENT4
            assert connection.recv(100).decode() == f"port {port}"
    assert not host.netns.listens(80)
    assert not cgroup.processes(host.cgroup / "supervisors"), "a process of Graft's runs"


def test_ipv6_and_udp_are_served_too(host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet) -> None:
    path, port = make_cgroup(), host.port()
    four, six = host.endpoint(f"{HOST4}:{port}"), host.endpoint(f"[{HOST6}]:{port}")
    host.graft("attach", "--cgroup", path, "-i", f"*:53={four}", "-i", f"[::]:53={six}")
    server = start_puppet(path)
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


def test_a_granted_destination_is_reached_from_its_endpoint(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    path = make_cgroup()
    source = host.endpoint("127.0.0.5:dynamic")
    host.graft("attach", "--cgroup", path, "-e", f"127.0.0.0/8={source}")
    program = start_puppet(path)
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


def test_after_a_taken_endpoint_a_container_may_still_bind_what_is_its_own(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    path, port, own = make_cgroup(), host.port(), host.port()
    taken = host.netns.listener("0.0.0.0", port)
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}")
    program = start_puppet(path)
    sock = program.socket()
    assert program.say("bind", sock, "0.0.0.0", 80) == "EADDRINUSE"
    assert program.say("bind", sock, "0.0.0.0", own) == "ok"
    assert program.say("name", sock) == ["0.0.0.0", own]
    assert program.say("listen", sock) == "ok"
    host.client.connected(HOST4, own).close()
    taken.close()


def test_a_namespace_that_a_host_network_container_makes_is_left_alone(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    path = make_cgroup()
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{host.port()}')}")
    program = start_puppet(path)
    assert program.say("netns") == "ok"
    listener = program.listener("0.0.0.0", 80)
    assert program.say("name", listener) == ["0.0.0.0", 80]
    assert host.ps_of(path)["sockets"] == []


def test_sockets_of_before_are_listed_and_stay_as_they_are(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path, port = make_cgroup(), host.port()
    program = start_puppet(path)
    listener = program.listener("0.0.0.0", port)
    said = host.graft("attach", "--cgroup", path, "--policy", write_policy(DENY_ALL)).stdout
    assert f"tcp listening 0.0.0.0:{port} (process {program.pid})" in said
    assert "which keep their addresses" in said
    with host.client.connected(HOST4, port) as connection:
        program.say("answer", listener, "as before")
        assert connection.recv(100) == b"as before"


def test_what_starts_later_below_an_attached_slice_is_covered(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    slice_, port = make_cgroup(), host.port()
    host.graft("attach", "--cgroup", slice_, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}")
    server = start_puppet(make_cgroup(slice_))
    listener = server.listener("0.0.0.0", 80)
    with host.client.connected(HOST4, port) as connection:
        server.say("answer", listener, "from below")
        assert connection.recv(100) == b"from below"


def test_a_cgroup_above_or_below_an_attached_one_is_refused(host: Host, make_cgroup: MakeCgroup) -> None:
    top = make_cgroup()
    middle = make_cgroup(top)
    bottom = make_cgroup(middle)
    rule = ["-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}"]
    host.graft("attach", "--cgroup", middle, *rule)
    for path, where in ((top, "above"), (bottom, "below")):
        said = host.graft("attach", "--cgroup", path, *rule, status=7).stderr
        assert f"{path} lies {where} {middle}" in said
    beside = make_cgroup(top)
    host.graft("attach", "--cgroup", beside, *rule)


def test_a_cgroup_that_goes_takes_its_rules_with_it(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    path, port = make_cgroup(), host.port()
    written = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={written}")
    number = host.ps_of(path)["id"]
    path.rmdir()
    path.mkdir()  # another one, at the same place
    assert host.ps() == []
    assert [key for key, _ in host.maps.containers.items() if key.value == number] == []
    assert list(host.maps.ingress.keys()) == []
    program = start_puppet(path)
    assert program.say("bind", sock := program.socket(), "0.0.0.0", port + 10_000) == "ok"
    assert program.say("name", sock)[1] == port + 10_000
    host.graft("ep", "del", written)


def test_ps_shows_sockets_supervisor_and_endpoints(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    path, port = make_cgroup(), host.port()
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={endpoint}")
    server = start_puppet(path)
    server.listener("0.0.0.0", 80)
    seen = host.ps_of(path)
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
    seen = host.ps_of(Path(host.container(program).cgroup))
    assert seen["supervisor"] == host.supervisor(program)
    assert [one["local"] for one in seen["sockets"]] == [f"0.0.0.0:{swapped}"]
    line = next(one for one in host.graft("ps").stdout.splitlines() if "swap" in one)
    assert f"tcp 0.0.0.0:{swapped}" in line


def test_attach_says_what_it_found_and_which_transport_serves(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    path = make_cgroup()
    start_puppet(path)
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


def test_a_unit_is_found_by_its_cgroup_where_systemd_cannot_be_asked(host: Host) -> None:
    top = cgroup.v2_mount() / f"graft-test-{os.getpid()}-units.slice"
    path = top / f"grafted-unit-{os.getpid()}.service"
    path.mkdir(parents=True)
    try:
        rule = f"*:80={host.endpoint('0.0.0.0:dynamic')}"
        said = host.graft("attach", "--cgroup", path.stem, "-i", rule).stdout
        assert f"{path.name}: systemd, {path}" in said
        host.graft("detach", "--cgroup", path.name)
    finally:
        path.rmdir()
        top.rmdir()


def test_a_container_in_a_namespace_of_its_own_is_not_taken_for_a_direct_one(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, netns: Callable[[], Netns]
) -> None:
    path = make_cgroup()
    start_puppet(path, netns().path)
    said = host.graft("attach", "--cgroup", path, "--transport", "direct", "-i", "*:80=x", status=7).stderr
    assert "direct is impossible: it is in a network namespace of its own" in said
    said = host.graft("attach", "--cgroup", path, "--transport", "swap", "-i", "*:80=x", status=7).stderr
    assert "started without Graft" in said and "graft run" in said
