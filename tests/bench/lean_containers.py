"""Containers of the OCI runtime for tests/bench/lean.py: runc's own, and the same under Graft."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_POLICY = "name: web\nendpoints: {lean: '127.0.0.1:28081'}\ningress: [{bind: '0.0.0.0:80', endpoint: lean}]\n"
REAL = "runc"


class Bundles(NamedTuple):
    """What starts containers. ``command`` runs a command in the benchmark's cgroup."""

    folder: Path
    environment: dict[str, str]
    parent: str
    command: Callable[[list[str]], None]

    def prepare(self) -> None:
        """Make what all containers have in common."""
        root = self.folder / "rootfs" / "bin"
        root.mkdir(parents=True)
        shutil.copy("/usr/bin/busybox", root / "busybox")
        (root / "sleep").symlink_to("busybox")
        subprocess.run([REAL, "spec"], cwd=self.folder, check=True)
        policies = Path(self.environment["GRAFT_STATE_DIR"]) / "policies"
        policies.mkdir(parents=True, exist_ok=True)
        (policies / "web.yaml").write_text(_POLICY)

    def start(self, name: str, runtime: str) -> None:
        """`create` and `start`, as an engine does."""
        bundle = self.folder / name
        bundle.mkdir()
        config = json.loads((self.folder / "config.json").read_text())
        config["process"] |= {"terminal": False, "args": ["/bin/sleep", "10000"]}
        config["root"] = {"path": str(self.folder / "rootfs"), "readonly": True}
        config["linux"]["cgroupsPath"] = f"/{self.parent}/{name}"
        config["annotations"] = {"graft.policy": "web"}
        (bundle / "config.json").write_text(json.dumps(config))
        for words in (["create", "-b", str(bundle), name], ["start", name]):
            self.command([runtime, "--root", str(self.folder / "state"), *words])

    def end(self, name: str, runtime: str) -> None:
        """Kill and delete one."""
        self.command([runtime, "--root", str(self.folder / "state"), "delete", "--force", name])
        shutil.rmtree(self.folder / name)
