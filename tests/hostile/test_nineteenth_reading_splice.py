"""What a nineteenth reading found: a container that has graftd take its time, which holds back the answer to a command
about it, stopped `graft import` half-way, had it rolled back, kept `graft policy apply` from containers that wait, and
had all who save something wait. Here graftd's answer about it is held back.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graft.commands import attach as attach_command
from graft.commands import policy_apply, transfer
from graft.model.settings import Settings
from graft.policy.model import Policy, policy_from_flags
from graft.saved.store import Store
from graft.splice import client as splice
from graft.splice import control
from graft.splice.control import NoAnswerError
from graft.state.installation import Installation
from tests.hostile.conftest import Without
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT6, HOST6, Netns, namespace
from tests.support.plain import Plain, plain
from tests.support.shell import output
from tests.support.udp import udp

pytestmark = pytest.mark.e2e

ELSEWHERE, THERE = "192.0.2.7", "192.0.2.8"


@pytest.fixture
def saving(host: Host) -> Host:
    return host.saving


@pytest.fixture
def pair(saving: Host) -> Iterator[tuple[Plain, Plain]]:
    """Two containers that are saved, under policies that grant two destinations: the first has graftd take its time."""
    with plain(saving) as slow, plain(saving) as other:
        for one in (slow, other):
            one.attach(*rules(saving, ELSEWHERE, THERE))
        yield slow, other
    saving.graft("down", "--force", "--forget")
    saving.graft("up")


def rules(host: Host, *destinations: str) -> list[str]:
    return [word for one in destinations for word in ("-e", f"{one}={host.endpoint('0.0.0.0:dynamic')}")]


def late(monkeypatch: pytest.MonkeyPatch, name: str, slow: Plain, unlocked: Callable[[], None]) -> None:
    """graftd does not answer ``name`` about that container, and nobody waits for a lock meanwhile."""
    real: Any = getattr(splice, name)

    def asked(where: Any, container: Any, *more: Any) -> object:
        if container.cgroup != str(slow.cgroup):
            return real(where, container, *more)
        unlocked()
        raise NoAnswerError("the daemon does not answer")

    monkeypatch.setattr(splice, name, asked)


def late_answers(monkeypatch: pytest.MonkeyPatch, unlocked: Callable[[], None]) -> None:
    """graftd does not answer any request to serve a container, and nobody waits for a lock but at the first of them."""
    real = control.ask

    def asked(settings: Settings, request: dict[str, Any], timeout: float = control.TIMEOUT_SECONDS) -> object:
        if request["do"] != "attach":
            return real(settings, request, timeout)
        if timeout != splice._UNDER_LOCK_SECONDS:
            unlocked()
        raise NoAnswerError("the daemon does not answer")

    monkeypatch.setattr(control, "ask", asked)


def lock_is_free(host: Host) -> Callable[[], None]:
    def check() -> None:
        host.graft("ep", "add", "bystander", "127.0.0.1:dynamic", timeout=10)
        host.graft("ep", "del", "bystander")

    return check


def narrowed(policy: Policy) -> Policy:
    return replace(policy, egress=tuple(one for one in policy.egress if THERE not in str(one)))


def destinations_of(host: Host, path: Path) -> str:
    return host.graft("policy", "show", path).stdout


def test_an_import_removes_all_that_it_is_to_remove(
    saving: Host, pair: tuple[Plain, Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    late(monkeypatch, "detach", pair[0], lock_is_free(saving))
    done = transfer.import_state(saving.settings, replace(Store(saving.settings).read()[0], attachments=()))
    assert len(done.detached) == 2 and len(done.unserved) == 1
    assert saving.ps() == []


def test_an_import_of_narrower_policies_is_not_rolled_back(
    saving: Host, pair: tuple[Plain, Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    late(monkeypatch, "attach", pair[0], lock_is_free(saving))
    before = Store(saving.settings).read()[0]
    wanted = replace(before, attachments=tuple(replace(one, policy=narrowed(one.policy)) for one in before.attachments))
    done = transfer.import_state(saving.settings, wanted)
    assert len(done.replaced) == 2 and len(done.unserved) == 1
    assert THERE not in saving.graft("export").stdout
    assert not any(THERE in destinations_of(saving, one.cgroup) for one in pair)


def test_a_policy_is_applied_to_containers_that_wait_too(
    saving: Host, pair: tuple[Plain, Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, _ = pair
    policy = narrowed(Store(saving.settings).read()[0].attachments[0].policy)
    with new_cgroup("waits") as path:
        saving.graft("attach", "--cgroup", path, *rules(saving, THERE))
    store = Store(saving.settings)
    same_name = replace(policy, name=slow.container.policy)
    with store.locked():  # the watcher removes what is written without it
        waiting = next(one for one in store.read()[0].attachments if path.name in one.target.name)
        store.prepare_attachment(replace(waiting, policy=replace(waiting.policy, name=same_name.name))).commit()
    late(monkeypatch, "attach", slow, lock_is_free(saving))
    with Installation(saving.settings) as graft:
        done = policy_apply.apply(graft, same_name, save=True)
    assert len(done.waiting) == 1 and len(done.unserved) == 1
    assert THERE not in str(store.attachment(waiting.target))


def test_a_first_attach_has_nobody_wait_and_stays(saving: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with plain(saving) as slow:
        late_answers(monkeypatch, lock_is_free(saving))
        policy = policy_from_flags("p", [], [f"{ELSEWHERE}={saving.endpoint('0.0.0.0:dynamic')}"], True)
        with Installation(saving.settings) as graft:
            done = attach_command.attach(graft, str(slow.cgroup), policy, save=True)
        assert done.unserved and not done.is_served
        assert [one["cgroup"] for one in saving.ps()] == [str(slow.cgroup)]
        assert ELSEWHERE in saving.graft("export").stdout


@pytest.mark.parametrize("defence", ["", "all of the peer"])
def test_a_socket_that_is_connected_to_a_stand_in_sends_nothing_to_0_0_0_1(
    host: Host, without: Without, defence: str
) -> None:
    """The last word of ::1 is 0.0.0.1, which is no address of the relay's."""
    with plain(without(defence) if defence else host) as container, namespace("lan") as lan:
        host = container.host
        join(lan, container.netns)
        port, out = host.port(), host.endpoint(f"[{HOST6}]:dynamic")
        server = container.udp(socket.AF_INET6)
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", 53))
        container.attach("-i", f"[::]:53={host.endpoint(f'[::]:{port}')}", "-e", f"{CLIENT6}={out}", "--deny")
        with server, closing(udp(host.client, CLIENT6)) as client:
            client.sendto(b"question", (HOST6, port))
            _, peer = server.recvfrom(100)
            server.connect(peer)
            lines = [line.split() for line in container.netns.run("cat", "/proc/net/udp6").splitlines()[1:]]
            stand_in = next(
                words[2] for words in lines if words[1].endswith(":0035") and not words[2].endswith(":0000")
            )
            try:
                server.sendto(b"secret", ("::ffff:0.0.0.1", int(stand_in.rpartition(":")[2], 16)))
                assert defence
            except PermissionError:
                assert not defence


def join(lan: Netns, inside: Netns) -> None:
    """A way out of a container of its own."""
    output(["ip", "-n", lan.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", inside.name])
    for netns, address in ((lan, "172.29.0.1/24"), (inside, "172.29.0.2/24")):
        netns.run("ip", "address", "add", address, "dev", "eth0")
        netns.run("ip", "link", "set", "eth0", "up")
    inside.run("ip", "route", "add", "default", "via", "172.29.0.1")
