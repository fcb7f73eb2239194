"""What an image's annotations have crun do, as root, once a container has a hook: Graft's."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from graft.errors import RefusedError
from graft.oci.options import RuntimeOptions
from graft.oci.request import check_annotations
from tests.hostile.test_fourth_reading import DOCKERS, PODMANS
from tests.support import engines
from tests.support.installation import Host

pytestmark = pytest.mark.e2e

POLICY = "web"


def build(podman: engines.Engine, folder: Path, annotation: str, asks: bool) -> None:
    """An image with that annotation, which may ask for a policy."""
    shutil.copy("/usr/bin/busybox", folder / "busybox")
    asked = f"ENV GRAFT_POLICY={POLICY}\n" if asks else ""
    (folder / "Containerfile").write_text(
        f'FROM scratch\nCOPY busybox /bin/busybox\n{asked}CMD ["/bin/busybox", "echo", "hello"]\n'
    )
    podman("build", "--annotation", annotation, "-t", "evil", folder)


def test_an_image_has_no_file_of_the_hosts_made(host: Host, tmp_path: Path) -> None:
    host.graft("up")
    policies = host.settings.state_dir / "policies"
    policies.mkdir(parents=True, exist_ok=True)
    (policies / f"{POLICY}.yaml").write_text(f"name: {POLICY}\nopen: true\n")
    victim, context = tmp_path / "nologin", tmp_path / "build"
    context.mkdir()
    root = engines.make_root(tmp_path / "root")
    with engines.podman(host, Path(tempfile.mkdtemp(prefix="gp-")), root) as podman:
        for asks in (False, True):
            build(podman, context, f"run.oci.hooks.stderr={victim}", asks)
            done = podman("run", "--rm", "--network", "none", *podman.run_flags, "evil", status=None)
            if asks:
                assert done.stdout == ""
                assert "annotation run.oci.hooks.stderr: podman copies an image's annotations" in done.stderr
            else:
                assert done.stdout == "hello\n", done.stderr  # without Graft's hook crun does not look at it
            assert not victim.exists()


@pytest.mark.parametrize("at", [*PODMANS, DOCKERS])
def test_crun_is_told_what_to_do_by_the_operator_only(at: str) -> None:
    def check(name: str, options: RuntimeOptions) -> None:
        config = {"annotations": {name: "x"}, "linux": {"cgroupsPath": at}}
        check_annotations(config, options, notified=False)

    for name in ("run.oci.hooks.stdout", "run.oci.hooks.stderr", "run.oci.handler", "run.oci.of-next-year"):
        check(name, RuntimeOptions(trust_annotations=True))
        with pytest.raises(RefusedError, match=name):
            check(name, RuntimeOptions(trust_annotations=False))
        if at == DOCKERS:
            check(name, RuntimeOptions())
        else:
            with pytest.raises(RefusedError, match=name):
                check(name, RuntimeOptions())
    for name in ("run.oci.keep_original_groups", "run.oci.mount_context_type", "graft.policy", "org.example"):
        check(name, RuntimeOptions(trust_annotations=False))
