"""dockerd and podman in the namespace that plays the host, with Graft's runtime over runc and crun."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from graft.kernel import cgroup
from tests.support.installation import Host
from tests.support.shell import Result, Word, output, run
from tests.support.wait import until

NEEDED = ("dockerd", "containerd", "runc", "podman", "crun", "conmon")
IMAGE = "graft-test"
_APPLETS = ("sh", "ls", "cat", "sleep", "nc", "echo", "test", "env", "true", "kill", "httpd", "mkdir")
_PROGRAMS = ("iperf3", "nginx")
_NGINX = """
daemon off; worker_processes 1; pid /tmp/pid; error_log stderr warn; user root;
events {} http { access_log off; client_body_temp_path /tmp/a; proxy_temp_path /tmp/b; fastcgi_temp_path /tmp/c;
uwsgi_temp_path /tmp/d; scgi_temp_path /tmp/e;
server { listen 0.0.0.0:80; location / { return 200 "port $server_port, from $remote_addr\\n"; } } }
"""


def make_root(folder: Path) -> Path:
    """A root file system of busybox, iperf3 and nginx, with the libraries that they need."""
    for name in ("bin", "etc", "tmp", "proc", "sys", "dev", "run", "var/log/nginx", "var/lib/nginx"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copy("/usr/bin/busybox", folder / "bin/busybox")
    for applet in _APPLETS:
        (folder / "bin" / applet).symlink_to("busybox")
    (folder / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\n")
    (folder / "etc/nginx.conf").write_text(_NGINX)
    for program in _PROGRAMS:
        path = shutil.which(program)
        assert path is not None
        for file in (path, *re.findall(r"/\S+", output(["ldd", path]))):
            target = folder / file.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return folder


def runtime_script(host: Host, folder: Path, runtime: str, command: Sequence[Word] | None = None) -> Path:
    """A program that is `graft-runtime`, or that ``command``, over ``runtime``, for this host's Graft."""
    words = command or [Path(sys.executable).with_name("graft-runtime")]
    settings = {**host.environment, "GRAFT_RUNTIME": runtime, "GRAFT_RUNTIME_CONFIG": str(folder / "none")}
    script = folder / f"graft-{runtime}"
    exports = "\n".join(f"export {name}='{value}'" for name, value in settings.items())
    script.write_text(f'#!/bin/sh\n{exports}\nexec {shlex.join(map(str, words))} "$@"\n')
    script.chmod(0o755)
    return script


def leftovers(host: Host) -> list[str]:
    """What is left of containers that an engine started; empty when none runs."""
    found = [f"record of {one.name}" for one in host.installation.containers.listing() if one.engine == "oci"]
    found += [f"process {pid}" for pid in cgroup.processes(host.cgroup / "supervisors")]
    found += [str(path) for path in (host.settings.run_dir / "oci").glob("*/")]
    return found


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's command line, run in the host's namespace.

    ``environment`` is what leads any command to this engine, and not to the machine's own; ``image`` is what its
    containers are made of, ``runtime`` the runtime that they get without a flag that says otherwise.
    """

    host: Host
    program: str
    environment: dict[str, str]
    image: tuple[str, ...]
    run_flags: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """docker or podman."""
        return Path(self.program).name

    def command(self, *words: Word) -> list[str]:
        """The engine's command, in the host's namespace."""
        return self.host.netns.command(self.program, *self.runtime, *words)

    def __call__(self, *words: Word, status: int | None = 0, timeout: float = 60) -> Result:
        """The same, run to its end, which has to be with ``status`` (None: any)."""
        return run(self.command(*words), environment=self.environment, status=status, timeout=timeout)

    def container(self, flags: Sequence[Word], *program: str, status: int | None = 0, network: str = "none") -> Result:
        """`run` of the test image."""
        return self("run", *self.run_flags, "--network", network, *flags, *self.image, *program, status=status)

    def started(self, name: str, flags: Sequence[Word], *program: str, network: str = "none") -> str:
        """A container in the background; gives its id."""
        return self.container(["-d", "--name", name, *flags], *program, network=network).stdout.split()[-1]

    def without_graft(self) -> Engine:
        """The same engine with the runtime that Graft's is a wrapper of."""
        return replace(self, runtime=())

    def remove(self, *names: str, status: int | None = 0) -> None:
        """Remove containers, running or not, and give them no time to end by themselves."""
        self("rm", *(("-t", "0") if self.name == "podman" else ()), "-f", *names, status=status)

    def remove_all(self) -> None:
        """Remove every container."""
        names = self("ps", "-aq").stdout.split()
        if names:
            self.remove(*names, status=None)


@contextmanager
def docker(host: Host, folder: Path, root: Path, config: Path | None = None) -> Iterator[Engine]:
    """A dockerd with runc, the runtime `graft` (or that ``config``) and the test image. ``folder``'s path has to be
    short; in ``folder/pid`` is the daemon's process id.
    """
    words: list[Word] = ["--exec-root", folder / "exec", "--data-root", folder / "data", "-p", folder / "pid"]
    words += ["-H", f"unix://{folder}/sock"]
    if config is None:
        words += ["--add-runtime", f"graft={runtime_script(host, folder, 'runc')}"]
    else:
        words += ["--config-file", config]
    words += ["--storage-driver=vfs", "--bridge=none", "--iptables=false", "--exec-opt", "native.cgroupdriver=cgroupfs"]
    words += ["--containerd-namespace", f"graft-test-{os.getpid()}"]
    limits = "--ulimit=nofile=20000:20000", "--ulimit=nproc=20000:20000"  # an engine's own may be too high here
    client = "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else "docker"  # the daemon's package has its own
    engine = Engine(host, client, {"DOCKER_HOST": f"unix://{folder}/sock"}, (IMAGE,), limits)
    log = folder / "log"
    with log.open("wb") as out:
        daemon = subprocess.Popen(
            host.netns.command("dockerd", *words),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def answers() -> bool:
        assert daemon.poll() is None, log.read_text()[-2000:]
        return engine("version", status=None).returncode == 0

    try:
        until("dockerd answers", answers, timeout=60, pause=0.1)
        archive = folder / "root.tar"
        output(["tar", "-C", root, "-cf", archive, "."])
        engine("import", archive, IMAGE)
        yield engine
        engine.remove_all()
    finally:
        daemon.terminate()
        try:
            daemon.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
        for mount in Path("/proc/self/mounts").read_text().splitlines():
            if mount.split()[1].startswith(f"{folder}/"):
                run(["umount", "-l", mount.split()[1]])


@contextmanager
def podman(host: Host, folder: Path, root: Path, command: Sequence[Word] | None = None) -> Iterator[Engine]:
    """A podman with storage of its own, and Graft's runtime, or that ``command``, over crun. It reads
    ``folder/containers.conf`` only.
    """
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
    )
    (folder / "containers.conf").write_text(
        '[containers]\npids_limit = 0\ndefault_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]\n'
        f'[engine]\ncgroup_manager = "cgroupfs"\nruntime = "crun"\nevents_logger = "file"\ntmp_dir = "{folder}/tmp"\n'
        f'static_dir = "{folder}/static"\nvolume_path = "{folder}/volumes"\n'
    )
    environment = {
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
    }
    runtime = ("--runtime", str(runtime_script(host, folder, "crun", command)))
    engine = Engine(host, "podman", environment, ("--rootfs", str(root)), runtime=runtime)
    with v1_controllers(folder):
        try:
            yield engine
        finally:
            engine.remove_all()
            run(["umount", "-R", folder / "graph/vfs"])


@contextmanager
def v1_controllers(folder: Path) -> Iterator[None]:
    """Where cgroup v1 is in use too, crun wants no controller left in the v2 tree: they are mounted elsewhere."""
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
