"""`graft trace`: what the hooks decide is shown, with who asked, in every transport, as long as somebody looks."""

from __future__ import annotations

import ctypes
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from graft.datapath.decisions import LEASE_SECONDS, Decisions
from tests.e2e.conftest import MakeCgroup, StartPuppet, WritePolicy
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4
from tests.support.plain import plain
from tests.support.program import Program
from tests.support.wait import until

pytestmark = pytest.mark.e2e

Record = dict[str, Any]

# Binds 0.0.0.0:80 and listens, then tries a destination that is denied; its thread has a name with an escape sequence.
_PROGRAM = f"""
import socket, sys, time
open("/proc/self/comm", "w").write("we\\x1b[31mb")
server = socket.socket(); server.bind(("0.0.0.0", 80)); server.listen()
try:
    socket.socket().connect(("{CLIENT4}", 9))
except OSError as error:
    print(error.errno, flush=True)
time.sleep(600)
"""

_POLICY = f"""
name: traced
egress:
  - to: {CLIENT4}/32
    ports: [9]
    action: deny
"""


@contextmanager
def tracing(host: Host, *words: object) -> Iterator[Program]:
    """`graft trace`, once it watches."""
    program = host.start_command([GRAFT, "trace", *map(str, words)])
    program.until("it watches", lambda: "watching" in program.complained)
    yield program
    assert program.stop(signal.SIGINT) == 130


def records(program: Program) -> list[Record]:
    return [json.loads(line) for line in program.said.splitlines() if line.endswith("}")]


def first(program: Program, condition: Callable[[Record], bool]) -> Record:
    """The first decision that is like that; waits for it."""
    return program.until("a decision", lambda: next((one for one in records(program) if condition(one)), None)) or {}


def test_what_a_program_under_graft_run_does_is_shown(host: Host, write_policy: WritePolicy) -> None:
    port = host.port()
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    policy = write_policy(_POLICY + f"ingress:\n  - bind: 0.0.0.0:80\n    endpoint: {endpoint}\n")
    with tracing(host, "--json") as seen, tracing(host) as text:
        program = host.start("--policy", policy, "--", "python3", "-c", _PROGRAM)
        assert program.says("13") == "13\n"  # EACCES
        pid = program.child()
        bind = first(seen, lambda one: one["call"] == "bind" and one["outcome"] == "granted")
        assert (bind["address"], bind["port"], bind["protocol"]) == ("0.0.0.0", 80, "tcp")
        assert (bind["endpoint"], bind["endpoint_port"], bind["pid"]) == (endpoint, port, pid)
        assert bind["process"] == "we\x1b[31mb"
        assert bind["rule"].startswith("ingress any 0.0.0.0:80 ->")
        refused = first(seen, lambda one: one["call"] == "connect" and one["outcome"] == "refused")
        assert (refused["address"], refused["port"], refused["pid"]) == (CLIENT4, 9, pid)
        assert refused["rule"] == f"egress any {CLIENT4}/32:9 -> deny"
        listen = first(seen, lambda one: one["call"] == "listen")
        assert (listen["outcome"], listen["endpoint"], listen["port"]) == ("granted", endpoint, 80)
        assert (listen["process"], listen["pid"]) == ("we\x1b[31mb", pid)
        line = f"we\\x1b[31mb[{pid}] bind tcp 0.0.0.0:80 -> {endpoint} 0.0.0.0:{port} (host)"
        text.says(line)
        text.says(f"connect tcp {CLIENT4}:9 -> refused by egress any {CLIENT4}/32:9 -> deny")
        assert len([one for one in records(seen) if one["call"] == "connect"]) == 1
        program.stop()


def test_what_is_left_to_the_container_is_shown(host: Host) -> None:
    with tracing(host, "--json", "--call", "bind") as seen:
        host.run(["-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}"], "python3", "-c", _bind(8123))
        found = first(seen, lambda one: one["port"] == 8123)
        assert (found["outcome"], found["endpoint"], found["rule"]) == ("container", None, None)
        assert {one["call"] for one in records(seen)} == {"bind"}


def test_who_sets_an_option_that_is_refused_is_shown(host: Host) -> None:
    with tracing(host, "--json", "--call", "option") as seen:
        endpoint = host.endpoint("0.0.0.0:dynamic")
        assert host.run(["--deny", "-i", f"0.0.0.0:80={endpoint}"], "python3", "-c", _FREEBIND).stdout == "1\n"  # EPERM
        found = first(seen, lambda one: one["outcome"] == "refused")
        assert found["process"] == "python3" and found["pid"] > 1


_FREEBIND = """
import socket
try:
    socket.socket().setsockopt(socket.SOL_IP, 15, 1)
except OSError as error:
    print(error.errno)
"""


def _bind(port: int) -> str:
    return f"import socket; socket.socket().bind(('127.0.0.1', {port}))"


def test_filters_are_of_container_verdict_and_endpoint(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    one, other = make_cgroup(), make_cgroup()
    ports = host.port(), host.port()
    names = [host.endpoint(f"0.0.0.0:{port}") for port in ports]
    for path, name in zip((one, other), names, strict=True):
        host.graft("attach", "--cgroup", path, "--deny", "-i", f"0.0.0.0:80={name}", "-e", f"{CLIENT4}={name}")
    with (
        tracing(host, "--json", one) as of_one,
        tracing(host, "--json", "--verdict", "refused") as refused,
        tracing(host, "--json", "--endpoint", names[1]) as of_endpoint,
    ):
        for path in (one, other):
            puppet = start_puppet(path)
            assert puppet.bind("0.0.0.0", 80) == "ok"
            assert puppet.bind("0.0.0.0", 81) == "EACCES"
            assert puppet.sendto(CLIENT4, 9) == "EACCES"  # from an endpoint with a port only a bound socket sends
        last = first(refused, lambda found: found["container"] == other.name and found["call"] == "send")
        assert (last["address"], last["port"], last["protocol"]) == (CLIENT4, 9, "udp")
        first(of_endpoint, lambda found: found["endpoint"] == names[1])
        first(of_one, lambda found: found["port"] == 81)
        assert {found["outcome"] for found in records(refused)} == {"refused"}
        assert {found["container"] for found in records(of_one)} == {one.name}
        assert {found["endpoint"] for found in records(of_endpoint)} == {names[1]}


def test_what_goes_by_graftd_is_shown(host: Host) -> None:
    with plain(host) as container, tracing(host, "--json") as seen:
        with host.client.listener(CLIENT4) as listener:
            port = listener.getsockname()[1]
            container.attach("-e", f"{CLIENT4}={host.endpoint('0.0.0.0:dynamic')}")
            with container.tcp() as client:
                client.connect((CLIENT4, port))
        found = first(seen, lambda one: one["outcome"] == "relayed")
        assert (found["call"], found["address"], found["port"]) == ("connect", CLIENT4, port)


def test_bad_filters_are_one_line(host: Host) -> None:
    assert "--call: no such value: 'bnd'" in host.graft("trace", "--call", "bnd", status=2).stderr
    assert "--verdict: no such value" in host.graft("trace", "--verdict", "ok", status=2).stderr
    assert "nobody" in host.graft("trace", "nobody", status=3).stderr
    assert "no-such" in host.graft("trace", "--endpoint", "no-such", status=3).stderr


def test_events_that_a_watcher_does_not_read_are_counted(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet
) -> None:
    path = make_cgroup()
    host.graft("attach", "--cgroup", path, "--deny", "-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}")
    number = host.ps_of(path)["id"]
    puppet = start_puppet(path)
    slow, quick = Decisions(host.maps), Decisions(host.maps)
    read = 0
    for _ in range(40):
        puppet.say("refused connects", CLIENT4, 9, 100)
        events, lost = quick.read()
        assert not lost
        read += len([one for one in events if one.container == number])
    assert read == 4000
    events, lost = slow.read()
    assert 0 < len(events) < 4000 and len(events) + lost >= 4000
    for _ in range(40):
        puppet.say("refused connects", CLIENT4, 9, 100)  # nobody reads
    events, lost = quick.read()
    assert lost >= 4000 - len(events) > 0
    slow.close()
    quick.close()


def test_who_was_killed_is_forgotten(host: Host) -> None:
    with tracing(host) as seen:
        pass
    assert seen.process.returncode == 130
    killed = host.start_command([GRAFT, "trace"])
    killed.until("it watches", lambda: "watching" in killed.complained)
    killed.stop(signal.SIGKILL)
    until("the lease ends", lambda: _is_over(host), LEASE_SECONDS + 5)


def _is_over(host: Host) -> bool:
    value = host.maps.watches.get(ctypes.c_uint32(0))
    return value is not None and value.until < time.clock_gettime_ns(time.CLOCK_MONOTONIC)
