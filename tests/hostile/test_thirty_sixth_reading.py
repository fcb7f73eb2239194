"""What a thirty-sixth reading found: a container whose cgroup has a name that is not UTF-8 was attached, and no command
found it afterwards: it kept its policy when others got a narrower one, and nobody removed what it had in the maps. And
namespaces that no endpoint had any more kept the table of addresses full, so that those of the next one were not noted:
a broadcast address there was like any other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from graft.datapath import layout
from graft.kernel import cgroup
from graft.state import host_addresses
from tests.hostile.conftest import Confine, graft_without
from tests.hostile.test_thirty_first_reading import DGRAM, INET, SO_BROADCAST, heard
from tests.hostile.test_thirty_third_reading import BROADCAST_THERE, EVERYWHERE, another_namespace
from tests.kernel.test_lifecycle import numbers
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4
from tests.support.puppet import puppet
from tests.support.shell import AS_NOBODY, Word, run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(250)]

WIDE = "name: p\nendpoints: {out: '0.0.0.0:dynamic'}\negress: [{to: 0.0.0.0/0, endpoint: out}]\ndefault: deny\n"
NARROW = "name: p\ndefault: deny\n"
TIMES = 3
UNREADABLE = "names of any bytes"


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Path]:
    """A cgroup as a user may name one in a tree that is delegated to him."""
    path = Path(os.fsdecode(os.fsencode(cgroup.v2_mount()) + b"/graft-test-%d-x\xff\xfe" % os.getpid()))
    path.mkdir()
    try:
        yield path
    finally:
        if path.exists():
            path.rmdir()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A wide policy and a narrow one of its name."""
    wide, narrow = tmp_path / "wide.yaml", tmp_path / "narrow.yaml"
    wide.write_text(WIDE)
    narrow.write_text(NARROW)
    return wide, narrow


@pytest.mark.parametrize("without", ["", UNREADABLE], ids=["", "control"])
@pytest.mark.parametrize("by_path", [False, True])
def test_it_gets_the_policy_that_others_get(
    host: Host, odd: Path, files: tuple[Path, Path], by_path: bool, without: str
) -> None:
    command = graft_without(without)
    wide, narrow = files
    with host.client.listener(CLIENT4) as listener, puppet(odd, host.netns.path) as process:
        port = listener.getsockname()[1]
        run([*command, "attach", "--cgroup", odd, "--policy", wide], environment=host.environment, status=0)
        try:
            assert process.connect(CLIENT4, port) == "ok"
            chosen: list[Word] = ["--cgroup", odd] if by_path else []
            run([*command, "policy", "apply", narrow, *chosen], environment=host.environment)
            assert process.connect(CLIENT4, port) == ("ok" if without else "EACCES")
        finally:
            host.graft("detach", "--cgroup", odd)


def test_nothing_is_left_of_it_each_time_that_it_is_made_anew(host: Host, odd: Path, files: tuple[Path, Path]) -> None:
    saving, before = host.saving, numbers(host)
    saving.graft("attach", "--cgroup", odd, "--policy", files[0])
    try:
        for _ in range(TIMES):
            seen = numbers(host)
            odd.rmdir()
            odd.mkdir()
            until("attached again", lambda: numbers(host) - seen)  # noqa: B023
        saving.graft("ps")
        assert len(numbers(host) - before) == 1
    finally:
        saving.graft("detach", "--cgroup", odd)


def test_policy_apply_says_that_one_cannot_be_read(host: Host, files: tuple[Path, Path]) -> None:
    wide, narrow = files
    with new_cgroup("other") as other:
        host.graft("attach", "--cgroup", other, "--policy", wide)
        [record] = (one for one in host.installation.containers.listing() if one.cgroup == str(other))
        file = host.settings.run_dir / "containers" / f"{record.id}.json"
        text = file.read_text()
        try:
            file.write_text("{")
            said = host.graft("policy", "apply", narrow, status=8)
            assert str(file) in said.stderr
        finally:
            file.write_text(text)
            host.graft("detach", "--cgroup", other)


# ---- many namespaces, one after the other, filled the table of broadcast addresses

ROUNDS = (layout.MAX_NOTED - host_addresses._ROOM_OF_HOST) // host_addresses._MOST_OF_OTHERS
TENANT = r"""
import ctypes, socket, struct, sys
def fill(most):
    ctl = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    ctl.send(struct.pack("=IHHIIBBHiII", 32, 16, 5, 0, 0, 0, 0, 0, 1, 1, 1)); ctl.recv(65536)  # lo up
    def route(number):  # 11.x.y.z, broadcast, in the table local, on lo
        return struct.pack("=IHHII8BIHH4sHHI", 44, 24, 0x401, 0, 0, 2, 32, 0, 0, 255, 3, 253, 3, 0, 8, 1,
                           struct.pack("!I", (11 << 24) + number), 8, 4, 1)
    for at in range(0, most, 512):
        ctl.send(b"".join(map(route, range(at, at + 512))))
for line in sys.stdin:
    assert ctypes.CDLL(None).unshare(0x40000000) == 0
    fill(int(line))
    print("done", flush=True)
"""
"""Root of a user namespace, and of one network namespace after the other, each with so many broadcast addresses."""


@pytest.mark.parametrize("without", ["", "bounded addresses"], ids=["", "control"])
def test_namespaces_of_before_keep_no_broadcast_address_from_being_noted(
    host: Host, confine: Confine, without: str
) -> None:
    command = graft_without(without)
    tenant = [*map(str, AS_NOBODY), "unshare", "--map-root-user", "/usr/bin/python3", "-ISc", TENANT]
    with another_namespace(host, "0.0.0.0") as near, Popen(tenant, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        steps = ["make", INET, DGRAM, 0, "option", *SO_BROADCAST, "connect", BROADCAST_THERE, near.getsockname()[1]]
        host.graft("ep", "add", "out", "0.0.0.0:dynamic")
        policy = f"name: t\negress: [{EVERYWHERE[0]}, {', '.join(EVERYWHERE[2:])}]\ndefault: deny\n"
        one = confine(host, "swap", policy, "wait", *steps, "send", "-", "-", "wait")
        for number in range(ROUNDS):
            process.stdin.write(f"{host_addresses._MOST_OF_OTHERS}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            words = ["ep", "set" if number else "add", "there", "10.0.0.1:1000", "--netns", process.pid]
            run([*command, *words], environment=host.environment, status=0, timeout=60)
        words = ["ep", "set", "out", "0.0.0.0:dynamic", "--netns", host.client.name]
        run([*command, *words], environment=host.environment, status=0)
        one.resume()
        one.lines(3)
        assert bool(heard(near)) is bool(without)
        process.kill()
