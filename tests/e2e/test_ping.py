"""ping(8), run by an ordinary user under a policy with a rule for ICMP."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4
from tests.support.shell import AS_NOBODY, Result, Word, run

pytestmark = pytest.mark.e2e

NOBODY = 65534
# ping connects a datagram socket to port 1025 first, to see which address it has.
POLICY = f"""
name: pings
endpoints: {{out: 0.0.0.0:dynamic, out6: '[::]:dynamic'}}
egress:
  - {{to: {CLIENT4}, protocol: icmp, endpoint: out}}
  - {{to: '{CLIENT6}', protocol: icmp, endpoint: out6}}
  - {{to: 0.0.0.0/0, protocol: udp, ports: [1025], endpoint: out}}
  - {{to: '::/0', protocol: udp, ports: [1025], endpoint: out6}}
default: deny
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter. (Those above pytest's own are closed again by each run of it.)"""
    with tempfile.TemporaryDirectory(prefix="grafttest-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def policy(host: Host, folder: Path) -> Path:
    """A policy with rules for ICMP, on a host where the user nobody may ping."""
    host.netns.run("sysctl", "-qw", f"net.ipv4.ping_group_range={NOBODY} {NOBODY}")
    file = folder / "policy.yaml"
    file.write_text(POLICY)
    return file


def plain_ping(folder: Path) -> Path:
    """A ping without the capability that the package gives the file."""
    copy = folder / "ping"
    copy.write_bytes(Path("/usr/bin/ping").read_bytes())
    copy.chmod(0o755)
    return copy


def pings(host: Host, policy: Path, folder: Path, transport: str, *words: str) -> Result:
    """ping's result, in the container."""
    command: list[Word] = [plain_ping(folder), "-n", "-c", "3", "-i", "0.2", "-W", "10", *words]
    if transport == "born":
        return host.graft("run", "--policy", policy, "--user", "nobody", "--", *command, status=None)
    with new_cgroup("ping") as path:
        host.graft("attach", "--cgroup", path, "--policy", policy)
        try:
            return run([*in_cgroup(path), *host.netns.command(*AS_NOBODY, *command)])
        finally:
            host.remove_at(path)


@pytest.mark.parametrize("transport", ["born", "direct"])
@pytest.mark.parametrize("address", [CLIENT4, CLIENT6])
def test_ping_gets_its_answers(host: Host, policy: Path, folder: Path, transport: str, address: str) -> None:
    result = pings(host, policy, folder, transport, address)
    assert "3 packets transmitted, 3 received" in result.stdout, result.stderr


@pytest.mark.parametrize("transport", ["born", "direct"])
def test_ping_reaches_nobody_else(host: Host, policy: Path, folder: Path, transport: str) -> None:
    result = pings(host, policy, folder, transport, HOST4)
    assert " 0 received" in result.stdout


@pytest.mark.parametrize("group", [NOBODY - 1, 0])
def test_the_hosts_range_counts_for_the_programs_groups(host: Host, policy: Path, folder: Path, group: int) -> None:
    """Not for the supervisor's, which is root's and makes the socket."""
    host.netns.run("sysctl", "-qw", f"net.ipv4.ping_group_range={group} {group}")
    result = pings(host, policy, folder, "born", CLIENT4)
    assert result.returncode and "permitted" in result.stderr
    as_root = host.graft("run", "--policy", policy, "--", plain_ping(folder), "-c", "1", CLIENT4, status=None)
    assert ("1 received" in as_root.stdout) == (group == 0)


def test_a_supplementary_group_counts_too(host: Host, policy: Path) -> None:
    host.netns.run("sysctl", "-qw", "net.ipv4.ping_group_range=7777 7777")
    script = "import socket; socket.socket(2, 2, 1); print('made')"
    for groups, made in (("7777", True), ("7778", False)):
        inner = ["setpriv", "--reuid=65534", "--regid=65534", f"--groups={groups}", "--", "/usr/bin/python3", "-ISc"]
        result = host.graft("run", "--policy", policy, "--", *inner, script, status=None)
        assert ("made" in result.stdout) == made, result.stderr


def test_without_a_rule_for_icmp_a_ping_stays_in_its_own_namespace(host: Host, policy: Path, folder: Path) -> None:
    policy.write_text(POLICY.replace("protocol: icmp, ", "protocol: tcp, "))
    result = pings(host, policy, folder, "born", CLIENT4)
    assert " 0 received" in result.stdout or result.returncode
    assert "bytes from" not in result.stdout
