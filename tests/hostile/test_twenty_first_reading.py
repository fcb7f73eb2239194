"""What the twenty-first reading found: an image that leaves an attached slice, or has systemd do something, by what
podman copies from it; and containers of one policy, which kept each other from an endpoint's change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from graft.errors import ConflictError, GraftError, RefusedError
from graft.kernel import cgroup
from graft.oci import arguments, main
from graft.oci.options import RuntimeOptions
from graft.oci.request import check_annotations, check_cgroup
from tests.hostile.test_sixth_reading_images import _V2_ALONE, _bundle, _controllers_kept
from tests.support import engines
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.shell import Result, run

pytestmark = pytest.mark.e2e

PODMANS = {"io.container.manager": "libpod"}
PORT = 40864
_PROGRAM = f"""
busybox grep 0:: /proc/self/cgroup
nc -l -p {PORT} & sleep 0.5
busybox grep -qE ':{PORT:04X} 0+:0000 0A' /proc/net/tcp /proc/net/tcp6 && echo listens || echo refused
kill $! 2>/dev/null; true
"""

# ---- a container that asks for no policy, below a cgroup that has one


def started(host: Host, folder: Path, parent: Path, annotations: Mapping[str, str], undefended: bool = False) -> Result:
    """A container of podman's on the host's network, which asks for nothing, run in a cgroup below ``parent``."""
    folder.mkdir()
    _bundle(folder, parent.name, {**PODMANS, **annotations})
    config = json.loads((folder / "config.json").read_text())
    del config["annotations"]["graft.policy"]
    config["process"]["args"] = ["sh", "-c", _PROGRAM]
    config["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "mount", "ipc")]
    config["linux"]["cgroupsPath"] = f"/{parent.relative_to(cgroup.v2_mount())}/libpod-{'ab' * 32}"
    (folder / "config.json").write_text(json.dumps(config))
    runtime = "crun" if undefended else engines.runtime_script(host, folder, "crun")
    options = [f"--root={folder / 'crun'}", "--cgroup-manager=cgroupfs"]
    words = [runtime, *options, "run", "-b", folder, f"images-{os.getpid()}"]
    alone = ["unshare", "--mount", "sh", "-c", _V2_ALONE, cgroup.v2_mount(), *words]
    return run(host.netns.command(*alone))


@pytest.fixture
def sealed(host: Host, tmp_path: Path) -> Path:
    (tmp_path / "sealed.yaml").write_text("name: sealed\ndefault: deny\n")
    return tmp_path / "sealed.yaml"


@pytest.mark.parametrize("undefended", [False, True], ids=["", "control: crun alone"])
def test_an_image_stays_in_the_cgroup_whose_policy_it_is_under(
    host: Host, tmp_path: Path, sealed: Path, undefended: bool
) -> None:
    out = f"out-{os.getpid()}"
    with _controllers_kept(), new_cgroup("images") as parent:
        host.graft("attach", "--cgroup", parent, "--policy", sealed)
        inside = started(host, tmp_path / "inside", parent, {}, undefended)
        assert inside.stdout.splitlines()[-1:] == ["refused"], inside
        leaving = started(host, tmp_path / "leaving", parent, {"run.oci.delegate-cgroup": f"../../{out}"}, undefended)
        host.remove_at(parent)
    for folder in (cgroup.v2_mount() / out, parent.parent / out):
        if folder.exists():
            folder.rmdir()
    if undefended:
        assert leaving.stdout.splitlines()[-1:] == ["listens"], leaving
    else:
        assert leaving.returncode and "leads out of the container's cgroup" in leaving.stderr


@pytest.mark.parametrize(
    ("annotations", "error"),
    [
        ({"run.oci.systemd.subgroup": "../x"}, ConflictError),
        ({"run.oci.delegate-cgroup": "a/../../x"}, ConflictError),
        ({"org.systemd.property.Slice": "'system.slice'"}, RefusedError),
        ({"org.systemd.property.PIDs": "[uint32 4242]"}, RefusedError),
        ({"org.criu.config": "/images/file"}, RefusedError),
        ({"run.oci.systemd.subgroup": "x", "org.systemd.property.KillSignal": "37"}, None),
        ({}, None),
    ],
)
def test_what_leads_out_of_its_cgroup_is_refused_to_who_asks_for_nothing(
    tmp_path: Path, annotations: dict[str, str], error: type[GraftError] | None
) -> None:
    config = {"annotations": {**PODMANS, **annotations}, "process": {"env": []}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    invocation = arguments.parse(["create", "--bundle", str(tmp_path), "one"])
    if error is None:
        main.prepare_if_asked(invocation, RuntimeOptions(), "/bin/false")
        return
    with pytest.raises(error):
        main.prepare_if_asked(invocation, RuntimeOptions(), "/bin/false")
    check_cgroup(config, RuntimeOptions(trust_annotations=True))
    check_cgroup({"annotations": annotations}, RuntimeOptions())  # of another engine: no image's


# ---- a container that asks for a policy


@pytest.mark.parametrize(
    ("name", "value", "is_podmans"),
    [
        ("Conflicts", "['graftd.service']", False),
        ("Wants", "['payload.service']", False),
        ("Slice", "'system.slice'", False),
        ("Delegate", "", False),
        ("KillSignal", "37", True),
        ("KillSignal", "37, 'x'", False),
        ("TimeoutStopUSec", "uint64 10000000", True),
        ("TimeoutStopUSec", "uint64 1\n", False),
    ],
)
def test_an_image_asks_systemd_for_nothing(name: str, value: str, is_podmans: bool) -> None:
    config = {"annotations": {**PODMANS, f"org.systemd.property.{name}": value}}
    check_annotations(config, RuntimeOptions(trust_annotations=True), notified=True)
    if is_podmans:
        check_annotations(config, RuntimeOptions(), notified=True)
        return
    with pytest.raises(RefusedError, match=f"annotation org.systemd.property.{name}"):
        check_annotations(config, RuntimeOptions(), notified=True)


# ---- containers of one policy


def policy(path: Path, address: str, ports: str = "") -> Path:
    rule = f"{{to: 127.0.0.0/8, endpoint: decl{ports}}}"
    path.write_text(f"name: shared\nendpoints:\n  decl: {address}:dynamic\negress:\n  - {rule}\ndefault: deny\n")
    return path


def test_all_containers_of_a_policy_get_an_endpoint_that_it_declares_anew(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "shared.yaml"
    with new_cgroup("one") as one, new_cgroup("two") as two:
        for path in (one, two):
            host.graft("attach", "--cgroup", path, "--policy", policy(file, "0.0.0.0"))
        policy(file, "127.0.0.1", ", ports: [80]")
        alone = host.graft("policy", "apply", file, "--cgroup", one, status=4)
        assert "endpoints.decl: already exists" in alone.stderr
        host.graft("policy", "apply", file)
        for path in (one, two):
            assert "127.0.0.0/8:80 from decl = 127.0.0.1:dynamic" in host.graft("policy", "show", path).stdout
        assert [found["name"] for found in json.loads(host.graft("ep", "show", "--json").stdout)].count("decl") == 1
        for path in (one, two):
            host.remove_at(path)
    assert "decl" not in host.graft("ep", "show").stdout
