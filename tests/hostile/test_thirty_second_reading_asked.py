"""What the thirty-second reading found of who asks: an endpoint that is not open any more, which one that had asked for
it kept, at its new address.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import _docker, container_root, docker
from tests.hostile.conftest import graft_without
from tests.hostile.test_twenty_third_reading import GRAFTS, image
from tests.support.cgroups import new_cgroup
from tests.support.engines import Engine
from tests.support.installation import Host
from tests.support.puppet import puppet
from tests.support.shell import Result, run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(250)]

__all__ = ["_docker", "container_root", "docker"]

PAIRS = "GRAFT_CONV_PAIRS=0.0.0.0:81=front"
SHOWS = ("busybox", "netstat", "-ltn")


def closed_by(how: str, host: Host, folder: Path, old: str, new: str, without: str = "") -> Result:
    """The endpoint ``front`` gets another address, and is not open there: `ep set`, or an import."""
    command = graft_without(without)
    if how == "ep set":
        return run([*command, "ep", "set", "front", new], environment=host.environment)
    text = host.graft("export").stdout
    assert "    open: true\n" in text
    (folder / "all.yaml").write_text(text.replace(old, new).replace("    open: true\n", ""))
    return run([*command, "import", folder / "all.yaml"], environment=host.environment)


def in_force(host: Host) -> str:
    """The policy of the one that has asked, as it is shown."""
    [asked] = [one for one in host.installation.containers.listing() if one.origin == "pairs"]
    return host.graft("policy", "show", asked.id).stdout


@pytest.mark.parametrize("without", ["", "closed endpoints"])
@pytest.mark.parametrize("how", ["ep set", "import"])
def test_who_asked_loses_an_endpoint_that_is_not_open_any_more(
    host: Host, docker: Engine, tmp_path: Path, how: str, without: str
) -> None:
    """One by a policy of the operator's keeps it."""
    saving, first, second = host.saving, host.port(), host.ports(2)
    old, new = f"127.0.0.1:{first}", f"0.0.0.0:{second}"
    saving.graft("ep", "add", "front", old, "--open")
    wanted = image(docker, "asker", PAIRS)
    (tmp_path / "p.yaml").write_text("name: p\ningress: [{bind: '0.0.0.0:80', endpoint: front}]\ndefault: deny\n")
    with new_cgroup("theirs") as theirs:
        saving.graft("attach", "--cgroup", theirs, "--policy", tmp_path / "p.yaml")
        docker("run", "-d", "--name", "asker", *docker.run_flags, *GRAFTS, wanted, "sleep", "1000")
        said = closed_by(how, saving, tmp_path, old, new, without)
        assert ("a deleted endpoint" in in_force(saving)) != bool(without)
        docker("exec", "-d", "asker", "nc", "-l", "-p", "81")
        shown = ("exec", "asker", *SHOWS)
        until("it listens", lambda: ":81 " in docker(*shown, status=None).stdout or host.netns.listens(second))
        assert host.netns.listens(second) == bool(without)
        assert ("has asked for front, which is not open now: it has lost that" in said.stderr) != bool(without)
        saving.graft("ep", "set", "front", f"127.0.0.1:{second + 1}")
        with puppet(theirs, host.netns.path) as one:
            assert one.bind("0.0.0.0", 80) == "ok"
        docker("rm", "-f", "asker")
        saving.graft("detach", "--cgroup", theirs)
    saving.graft("down", "--force", "--forget", status=None)
    saving.graft("up")


def test_an_import_that_fails_takes_it_from_nobody(host: Host, docker: Engine, tmp_path: Path) -> None:
    saving, port = host.saving, host.ports(2)
    saving.graft("ep", "add", "front", f"127.0.0.1:{port}", "--open")
    saving.graft("ep", "add", "out", "0.0.0.0:dynamic")
    with new_cgroup("theirs") as theirs:
        (tmp_path / "p.yaml").write_text("name: p\negress: [{to: 127.0.0.0/8, endpoint: out}]\ndefault: deny\n")
        saving.graft("attach", "--cgroup", theirs, "--policy", tmp_path / "p.yaml")
        docker(
            "run", "-d", "--name", "asker", *docker.run_flags, *GRAFTS, image(docker, "asker", PAIRS), "sleep", "1000"
        )
        before = in_force(saving)
        endpoints = f"endpoints:\n  front: 127.0.0.1:{port + 1}\n  out: '[::]:dynamic'\n"
        (tmp_path / "fails.yaml").write_text(f"version: 1\nattachments: []\n{endpoints}")
        assert "use 'out' as an IPv4 endpoint" in saving.graft("import", tmp_path / "fails.yaml", status=4).stderr
        assert in_force(saving) == before
        docker("exec", "-d", "asker", "nc", "-l", "-p", "81")
        until("it listens there", lambda: host.netns.listens(port))
        docker("rm", "-f", "asker")
        saving.graft("detach", "--cgroup", theirs)
    saving.graft("down", "--force", "--forget", status=None)
    saving.graft("up")
