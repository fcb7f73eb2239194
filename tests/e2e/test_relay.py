"""Which relay serves: chosen, shown, kept, and refused where this kernel cannot be trusted with it."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.datapath.layout import FlowValue
from graft.kernel import cgroup
from graft.kernel.bpf import Map
from graft.splice import client as splice
from graft.splice import selftest_result
from graft.splice.selftest_result import SelftestResult
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4
from tests.support.plain import Plain, plain
from tests.support.program import start
from tests.support.relayed import pair, published, talk
from tests.support.wait import until

pytestmark = pytest.mark.e2e


@pytest.fixture
def kernel(host: Host) -> Iterator[Plain]:
    """A container that is to have the relay in the kernel."""
    with plain(host, "kernel") as made:
        yield made


@pytest.fixture
def failing(host: Host) -> Iterator[None]:
    """A machine whose kernel failed the self-test."""
    selftest_result.get(host.settings)
    kept = host.settings.run_dir / "kernel-relay.json"
    before = kept.read_text()
    kept.write_text(json.dumps({**json.loads(before), "problem": "bytes are lost"}))
    yield
    kept.write_text(before)


def moved(host: Host) -> list[int]:
    """Bytes that the kernel moved, of each flow that it has."""
    flows = Map.pinned(host.settings.pin_dir / "flows", ctypes.c_uint64, FlowValue)
    return sorted(value.moved for _, value in flows.items())


def test_the_kernel_moves_what_comes_in_and_what_goes_out(kernel: Plain) -> None:
    host = kernel.host
    with kernel.listener() as listener, host.client.listener(CLIENT4) as world:
        client, accepted = pair(kernel, listener, published(kernel))
        with client, accepted:
            talk(client, accepted)
            before = moved(host)
            assert len(before) == 2
            client.sendall(b"1" * 1000)
            assert accepted.recv(2000) == b"1" * 1000
            assert sum(moved(host)) == sum(before) + 1000
        until("both are gone", lambda: moved(host) == [])
        with kernel.tcp() as program:
            program.connect(world.getsockname())
            accepted, _ = world.accept()
            with accepted:
                talk(program, accepted)
                assert len(moved(host)) == 2


def test_what_serves_is_told_and_kept_until_another_is_asked_for(kernel: Plain) -> None:
    host = kernel.host
    rule = f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}"
    attach = ("attach", "--cgroup", kernel.cgroup)
    assert "relay kernel (sockmap)" in host.graft(*attach, "--relay", "kernel", "-i", rule).stdout
    assert "relay kernel (sockmap)" in host.graft(*attach, "-i", rule).stdout
    assert "kernel (sockmap)" in host.graft("ps").stdout
    [listed] = json.loads(host.graft("ps", "--json").stdout)
    assert listed["relay"]["relay"] == "kernel (sockmap)"
    assert "relay splice(2)" in host.graft(*attach, "--relay", "splice", "-i", rule).stdout
    assert "relay splice(2)" in host.graft(*attach, "-i", rule).stdout


def test_a_daemon_that_is_started_again_serves_by_the_same_relay(kernel: Plain) -> None:
    published(kernel)
    splice.stop(kernel.host.settings)
    program = start([GRAFT, "daemon"], {**os.environ, **kernel.host.environment})
    try:
        program.until("it serves", lambda: (kernel.host.settings.run_dir / "graftd.sock").exists())
        until("served", lambda: kernel.described()["serves"])
        assert kernel.described()["relay"] == "kernel (sockmap)"
    finally:
        program.stop()


def test_a_kernel_that_failed_the_self_test_is_not_used(kernel: Plain, failing: None) -> None:
    host = kernel.host
    rule = f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}"
    refused = host.graft("attach", "--cgroup", kernel.cgroup, "--relay", "kernel", "-i", rule, status=6)
    assert refused.stderr.strip() == (
        "graft: --relay: the relay in the kernel cannot be used on this machine: bytes are lost (--relay splice)"
    )
    assert not host.installation.containers.listing()


def test_where_it_served_and_fails_now_splice_takes_its_place_and_says_so(kernel: Plain, host: Host) -> None:
    published(kernel)
    splice.stop(host.settings)
    kept = host.settings.run_dir / "kernel-relay.json"
    before = kept.read_text()
    kept.write_text(json.dumps({**json.loads(before), "problem": "bytes are lost"}))
    program = start([GRAFT, "daemon"], {**os.environ, **host.environment})
    try:
        program.until("it serves", lambda: (host.settings.run_dir / "graftd.sock").exists())
        until("served", lambda: kernel.described()["serves"])
        assert kernel.described()["relay"] == "splice(2)"
        assert "splice(2) serves, because the relay in the kernel fails here: bytes are lost" in program.complained
    finally:
        program.stop()
        kept.write_text(before)


def test_a_daemon_that_finds_no_verdict_serves_by_splice_while_the_kernel_is_tested(kernel: Plain, host: Host) -> None:
    with kernel.listener() as listener:
        port = published(kernel)
        splice.stop(host.settings)
        (host.settings.run_dir / "kernel-relay.json").unlink()
        program = start([GRAFT, "daemon"], {**os.environ, **host.environment})
        try:
            program.until("it serves", lambda: (host.settings.run_dir / "graftd.sock").exists())
            until("served", lambda: kernel.described()["serves"])
            assert kernel.described()["relay"] == "splice(2)"
            kernel.until_published(port)
            for one in pair(kernel, listener, port):
                one.close()
            until("tested", lambda: kernel.described()["relay"] == "kernel (sockmap)", 60)
            assert selftest_result.stored(host.settings) == SelftestResult("")
        finally:
            program.stop()


def test_a_container_that_shares_the_hosts_namespace_has_no_relay(host: Host, tmp_path: Path) -> None:
    path = cgroup.v2_mount() / f"graft-test-{os.getpid()}-relay"
    path.mkdir()
    try:
        said = host.graft("attach", "--cgroup", path, "--relay", "kernel", status=7).stderr
        assert "transport direct has no relay" in said
    finally:
        path.rmdir()


def test_a_rule_for_udp_is_said_to_have_no_effect(kernel: Plain) -> None:
    host = kernel.host
    tcp, udp = (
        f"0.0.0.0:{port}={host.endpoint('0.0.0.0:dynamic', proto)}" for port, proto in ((53, "tcp"), (54, "udp"))
    )
    said = host.graft("attach", "--cgroup", kernel.cgroup, "-i", tcp, "-i", udp).stdout
    assert f"-i {udp} has no effect: it is for UDP, and transport splice supports only TCP" in said
    assert f"-i {tcp} has" not in said


def test_an_unknown_relay_is_a_usage_error(host: Host) -> None:
    assert (
        "--relay: 'sendfile' is not a relay"
        in host.graft("attach", "--cgroup", "x", "--relay", "sendfile", status=2).stderr
    )


def test_doctor_tells_of_both_relays(host: Host) -> None:
    found = {one["name"]: one for one in json.loads(host.graft("doctor", "--json").stdout)}
    assert found["relay splice(2)"]["present"]
    assert found["relay in the kernel"]["present"]
