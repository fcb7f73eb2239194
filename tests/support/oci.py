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
from dataclasses import dataclass
from pathlib import Path

from graft.kernel import cgroup
from tests.support.hostnet import v1_controllers
from tests.support.installation import Host
from tests.support.shell import Result, Word, output, run
from tests.support.wait import until

NEEDED = ("dockerd", "containerd", "runc", "podman", "crun", "conmon")
IMAGE = "graft-test"
_APPLETS = ("sh", "ls", "cat", "sleep", "nc", "echo", "test", "env", "true", "kill")
_PROGRAMS = ("iperf3", "nginx")
_LIMITS = "nofile=20000:20000"  # what an engine asks for may be too much here
_NGINX = """
daemon off; worker_processes 1; pid /tmp/pid; error_log stderr warn; user root;
events {} http { access_log off; client_body_temp_path /tmp/a; proxy_temp_path /tmp/b; fastcgi_temp_path /tmp/c;
uwsgi_temp_path /tmp/d; scgi_temp_path /tmp/e;
server { listen 0.0.0.0:80; location / { return 200 "port $server_port, from $remote_addr\\n"; } } }
"""


def make_root(folder: Path) -> Path:
    """A root file system of busybox, iperf3 and nginx, with the libraries that they need."""
    for name in ("bin", "etc", "tmp", "proc", "sys", "dev", "var/log/nginx", "var/lib/nginx"):
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
    """What is there of containers that an engine started; empty when none runs."""
    found = [f"record of {one.name}" for one in host.installation.containers.listing() if one.engine == "oci"]
    found += [f"process {pid}" for pid in cgroup.processes(host.cgroup / "supervisors")]
    found += [str(path) for path in (host.settings.run_dir / "oci").glob("*/")]
    return found


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's command line, run in the host's namespace. ``image`` is what its containers are made of."""

    host: Host
    command: tuple[str, ...]
    environment: dict[str, str]
    run_flags: tuple[str, ...]
    image: tuple[str, ...]

    def __call__(self, *words: Word, status: int | None = 0, timeout: float = 60) -> Result:
        """The engine's command, which has to end with ``status`` (None: any)."""
        command = self.host.netns.command(*self.command, *words)
        return run(command, environment=self.environment, status=status, timeout=timeout)

    def container(self, flags: Sequence[Word], *program: str, status: int | None = 0) -> Result:
        """`run` of the test image."""
        return self("run", *self.run_flags, *flags, *self.image, *program, status=status)

    def started(self, name: str, flags: Sequence[Word], *program: str) -> str:
        """A container in the background; gives its name."""
        self.container(["-d", "--name", name, *flags], *program)
        return name

    def remove_all(self) -> None:
        """Remove every container, running or not."""
        names = self("ps", "-aq").stdout.split()
        if names:
            self("rm", *(("-t", "0") if "podman" in self.command[0] else ()), "-f", *names, status=None)


@contextmanager
def docker(host: Host, folder: Path, root: Path) -> Iterator[Engine]:
    """A dockerd with the runtime `graft` and the test image. ``folder``'s path has to be short."""
    words: list[Word] = ["--exec-root", folder / "exec", "--data-root", folder / "data", "-p", folder / "pid"]
    words += ["-H", f"unix://{folder}/sock", "--add-runtime", f"graft={runtime_script(host, folder, 'runc')}"]
    words += ["--storage-driver=vfs", "--bridge=none", "--iptables=false", "--exec-opt", "native.cgroupdriver=cgroupfs"]
    client = "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else "docker"
    flags = ("--network", "none", "--ulimit", _LIMITS)
    engine = Engine(host, (client, "-H", f"unix://{folder}/sock"), {}, flags, (IMAGE,))
    with open(folder / "log", "wb") as log:
        daemon = subprocess.Popen(
            host.netns.command("dockerd", *map(str, words)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until("dockerd answers", lambda: engine("version", status=None).returncode == 0, timeout=60, pause=0.1)
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


@contextmanager
def podman(host: Host, folder: Path, root: Path, runtime: Word) -> Iterator[Engine]:
    """A podman with storage of its own, and ``runtime``."""
    conf = folder / "containers.conf"
    conf.write_text(
        '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]\n'
        '[engine]\ncgroup_manager="cgroupfs"\nevents_logger="file"\n'
    )
    storage = ["--root", folder / "root", "--runroot", folder / "run", "--tmpdir", folder / "tmp"]
    command = ("podman", *map(str, storage), "--storage-driver", "vfs", "--runtime", str(runtime))
    image = ("--rootfs", str(root))
    engine = Engine(host, command, {"CONTAINERS_CONF": str(conf)}, ("--network", "none"), image)
    with v1_controllers(folder):
        try:
            yield engine
        finally:
            engine.remove_all()
