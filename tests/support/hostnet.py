"""docker and podman of a test's own, whose host network is the namespace that plays the host."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graft.kernel import cgroup
from tests.support.namespaces import Netns
from tests.support.shell import Result, Word, output, run
from tests.support.wait import until

_LIMITS = "--ulimit=nofile=20000:20000", "--ulimit=nproc=20000:20000"  # what an engine asks for may be too much here


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's command, run in the host's namespace. Its containers are removed when the test ends."""

    name: str
    netns: Netns
    environment: dict[str, str]
    root: Path
    started: list[str] = field(default_factory=list)

    def __call__(self, *words: Word, status: int | None = 0) -> Result:
        """``docker WORDS`` or ``podman WORDS``."""
        command = self.netns.command(self.name, *words)
        return run(command, environment=self.environment, status=status, timeout=90)

    def start(self, name: str, *words: Word) -> str:
        """A container that sleeps, with these options; gives its id."""
        image = ["--rootfs", self.root] if self.name == "podman" else ["busybox-of-tests"]
        self.started.append(name)
        made = self("run", "-d", "--name", name, *_LIMITS, *words, *image, "/bin/busybox", "sleep", "600")
        return made.stdout.split()[-1]

    def remove_all(self) -> None:
        """End what was started."""
        for name in self.started:
            self("rm", "-f", name, status=None)


def root_file_system(folder: Path) -> Path:
    """busybox and nothing else."""
    root = folder / "rootfs"
    for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "run", "var"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    return root


@contextmanager
def v1_controllers(folder: Path) -> Iterator[None]:
    """Where cgroup v1 is in use too, crun wants no controller left in the v2 tree: they are mounted aside."""
    mounted = []
    if cgroup.v2_mount() != Path("/sys/fs/cgroup"):
        for name in (cgroup.v2_mount() / "cgroup.controllers").read_text().split():
            (folder / name).mkdir()
            if run(["mount", "-t", "cgroup", "-o", name, "cgroup", folder / name]).returncode == 0:
                mounted.append(folder / name)
    try:
        yield
    finally:
        for path in mounted:
            run(["umount", path])


@contextmanager
def podman(netns: Netns, folder: Path) -> Iterator[Engine]:
    """podman with storage of its own."""
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/runroot"\n'
    )
    (folder / "containers.conf").write_text(
        "[containers]\npids_limit = 0\n"
        f'[engine]\ncgroup_manager = "cgroupfs"\nruntime = "crun"\nevents_logger = "file"\ntmp_dir = "{folder}/tmp"\n'
        f'static_dir = "{folder}/static"\nvolume_path = "{folder}/volumes"\n'
    )
    environment = {
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
    }
    engine = Engine("podman", netns, environment, root_file_system(folder))
    with v1_controllers(folder):
        try:
            yield engine
        finally:
            engine.remove_all()
            run(["umount", "-R", folder / "graph/vfs"])


@contextmanager
def docker(netns: Netns, folder: Path) -> Iterator[Engine]:
    """A dockerd of the test's own."""
    environment = {"DOCKER_HOST": f"unix://{folder}/d.sock"}
    command = ["dockerd", "--storage-driver=vfs", "--bridge=none", "--iptables=false", f"--exec-root={folder}/exec"]
    command += [f"--data-root={folder}/data", "-H", environment["DOCKER_HOST"], "-p", f"{folder}/d.pid"]
    command += ["--exec-opt", "native.cgroupdriver=cgroupfs", "--containerd-namespace", f"t{os.getpid()}"]
    log = (folder / "log").open("wb")
    daemon = subprocess.Popen(netns.command(*command), stdout=log, stderr=log, start_new_session=True)
    engine = Engine("docker", netns, environment, root_file_system(folder))
    try:

        def ready() -> bool:
            assert daemon.poll() is None, (folder / "log").read_text()[-2000:]
            return engine("info", status=None).returncode == 0

        until("dockerd answers", ready, 60, pause=0.2)
        archive = folder / "root.tar"
        output(["tar", "-C", engine.root, "-cf", archive, "."])
        engine("import", archive, "busybox-of-tests")
        yield engine
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            engine.remove_all()
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        log.close()
        for mount in Path("/proc/self/mounts").read_text().splitlines():
            if mount.split()[1].startswith(f"{folder}/"):
                run(["umount", "-l", mount.split()[1]])
