"""Which relay serves: chosen, shown, kept, and refused where this kernel failed its self-test."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.datapath.layout import FlowValue
from graft.kernel.bpf import Map
from graft.splice import client as splice
from graft.splice import selftest_result
from graft.splice.selftest_result import SelftestResult
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import Plain, plain
from tests.support.relayed import pair, published, talk
from tests.support.wait import until

pytestmark = pytest.mark.e2e


@pytest.fixture
def container(host: Host) -> Iterator[Plain]:
    """A container that is to be served by the relay in the kernel."""
    with plain(host, "kernel") as made:
        yield made


def verdict_file(host: Host) -> Path:
    """Where the self-test's verdict on this kernel is kept."""
    return host.settings.run_dir / "kernel-relay.json"


@pytest.fixture
def keeps_verdict(host: Host) -> Iterator[None]:
    """Puts the self-test's verdict back when the test has changed it."""
    selftest_result.get(host.settings)
    before = verdict_file(host).read_text()
    yield
    verdict_file(host).write_text(before)


def fail_selftest(host: Host) -> None:
    """Have the kept verdict say that this kernel failed the self-test."""
    file = verdict_file(host)
    file.write_text(json.dumps({**json.loads(file.read_text()), "problem": "bytes are lost"}))


def moved(host: Host) -> list[int]:
    """The bytes that the kernel has moved of each of its flows."""
    flows = Map.pinned(host.settings.pin_dir / "flows", ctypes.c_uint64, FlowValue)
    return sorted(value.moved for _, value in flows.items())


def test_the_kernel_moves_what_comes_in_and_what_goes_out(container: Plain) -> None:
    host = container.host
    with container.listener() as listener, host.client.listener(CLIENT4) as world:
        client, accepted = pair(container, listener, published(container))
        with client, accepted:
            talk(client, accepted)
            before = moved(host)
            assert len(before) == 2
            client.sendall(b"1" * 1000)
            assert accepted.recv(2000) == b"1" * 1000
            assert sum(moved(host)) == sum(before) + 1000
        until("both flows are removed", lambda: moved(host) == [])
        with container.tcp() as program:
            program.connect(world.getsockname())
            accepted, _ = world.accept()
            with accepted:
                talk(program, accepted)
                assert len(moved(host)) == 2


def test_the_relay_is_shown_and_kept_until_another_is_asked_for(container: Plain) -> None:
    host = container.host
    rule = f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}"
    attach = ("attach", "--cgroup", container.cgroup)
    assert "relay kernel (sockmap)" in host.graft(*attach, "--relay", "kernel", "-i", rule).stdout
    assert "relay kernel (sockmap)" in host.graft(*attach, "-i", rule).stdout
    assert "kernel (sockmap)" in host.graft("ps").stdout
    [listed] = host.ps()
    assert listed["relay"]["relay"] == "kernel (sockmap)"
    assert "relay splice(2)" in host.graft(*attach, "--relay", "splice", "-i", rule).stdout
    assert "relay splice(2)" in host.graft(*attach, "-i", rule).stdout


def test_a_daemon_that_is_started_again_serves_by_the_same_relay(container: Plain) -> None:
    published(container)
    container.host.start_daemon()
    until("the container is served", lambda: container.described()["serves"])
    assert container.described()["relay"] == "kernel (sockmap)"


def test_a_kernel_that_failed_the_self_test_is_not_used(container: Plain, keeps_verdict: None) -> None:
    host = container.host
    fail_selftest(host)
    rule = f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}"
    refused = host.graft("attach", "--cgroup", container.cgroup, "--relay", "kernel", "-i", rule, status=6)
    assert refused.stderr.strip() == (
        "graft: --relay: the relay in the kernel cannot be used on this machine: bytes are lost (--relay splice)"
    )
    assert not host.installation.containers.listing()


def test_where_the_kernel_fails_the_next_self_test_splice_serves_and_says_so(
    container: Plain, host: Host, keeps_verdict: None
) -> None:
    published(container)
    splice.stop(host.settings)
    fail_selftest(host)
    daemon = host.start_daemon()
    until("the container is served", lambda: container.described()["serves"])
    assert container.described()["relay"] == "splice(2)"
    assert "splice(2) serves, because the relay in the kernel fails here: bytes are lost" in daemon.complained


def test_a_daemon_that_finds_no_verdict_serves_by_splice_while_the_kernel_is_tested(
    container: Plain, host: Host
) -> None:
    with container.listener() as listener:
        port = published(container)
        splice.stop(host.settings)
        verdict_file(host).unlink()
        host.start_daemon()
        until("the container is served", lambda: container.described()["serves"])
        assert container.described()["relay"] == "splice(2)"
        container.until_published(port)
        for one in pair(container, listener, port):
            one.close()
        until("the kernel is tested", lambda: container.described()["relay"] == "kernel (sockmap)", 60)
        assert selftest_result.stored(host.settings) == SelftestResult("")


def test_a_container_that_shares_the_hosts_namespace_has_no_relay(host: Host) -> None:
    with new_cgroup("relay") as path:
        said = host.graft("attach", "--cgroup", path, "--relay", "kernel", status=7).stderr
        assert "transport direct has no relay" in said


def test_attach_says_that_a_rule_for_icmp_has_no_effect(container: Plain, tmp_path: Path) -> None:
    host = container.host
    out, web = host.endpoint("0.0.0.0:dynamic"), host.endpoint("[::]:dynamic", "udp")
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        f"name: t\ningress: [{{bind: '[::]:53', endpoint: {web}}}]\n"
        f"egress: [{{to: {CLIENT4}, protocol: icmp, endpoint: {out}}}, {{to: {HOST4}, endpoint: {out}}}]\n"
    )
    said = host.graft("attach", "--cgroup", container.cgroup, "--policy", policy).stdout
    assert "egress[0] has no effect: transport splice relays TCP and UDP" in said
    assert "egress[1] has" not in said and "ingress[0] has" not in said


def test_an_unknown_relay_is_a_usage_error(host: Host) -> None:
    assert (
        "--relay: 'sendfile' is not a relay"
        in host.graft("attach", "--cgroup", "x", "--relay", "sendfile", status=2).stderr
    )


def test_doctor_lists_both_relays(doctor_report: dict[str, dict[str, Any]]) -> None:
    assert doctor_report["relay splice(2)"]["present"]
    assert doctor_report["relay in the kernel"]["present"]
