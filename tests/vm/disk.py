"""The root file system of the guests, and the kernels they boot: made once, kept until what they are made of changes.

A Debian 12 by debootstrap, in which the project's own .ci/setup is run, as `make setup` does on a user's machine. All
of it is made aside and renamed into place when it is whole.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from graft.splice.native.sources import MODULES
from tests.vm import initrd
from tests.vm.apt import Apt, mirror
from tests.vm.kernels import Kernel

ROOT = Path(__file__).resolve().parents[2]
FILES = Path(__file__).with_name("files")
PROJECT = "opt/graft"  # in the guest

_PACKAGES = "systemd systemd-sysv dbus udev kmod ca-certificates make git procps iproute2 util-linux busybox-static"
_PACKAGES_OF_OURS = "python3-yaml"  # what the Debian package depends on, and .ci/setup does not install
_ROOTLESS = "uidmap dbus-user-session"  # what podman recommends, for users' own containers
# What .ci/setup leaves stopped and disabled where systemd runs; in a chroot it cannot.
_SERVERS = "nginx iperf3 webhook redis-server postgresql haproxy unbound docker.service docker.socket containerd"
_TIMERS = "podman.socket podman-auto-update.timer podman-restart apt-daily.timer apt-daily-upgrade.timer fstrim.timer"
_AT_BOOT = "podman.service podman-auto-update.service"  # its timer is not all that starts it
_BYTES = 8 << 30
_PROXIES = ("http_proxy", "https_proxy", "no_proxy")

Say = Callable[[str], None]


class BuildError(Exception):
    """A step that failed; the text names it and the log."""


def cache_folder() -> Path:
    """Where everything is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "graft" / "vm"


def _key() -> str:
    """Changes with whatever the root file system is made of."""
    # The guest has what was built with the disk.
    compiled = [ROOT / "setup.py", ROOT / "bpf/graft.h", *sorted((ROOT / "graft/swap/compiled").iterdir())]
    compiled += [ROOT / f"graft/splice/{name}.py" for name in MODULES]
    compiled += sorted((ROOT / "graft/splice/native").glob("*.py"))
    made_of = [ROOT / ".ci/setup", *compiled, Path(__file__), Path(initrd.__file__), *sorted(FILES.iterdir())]
    dependencies = (ROOT / "pyproject.toml").read_text().partition("\n[tool.ruff")[0]  # as .ci/setup looks at it
    return hashlib.sha256(b"".join([dependencies.encode(), *(file.read_bytes() for file in made_of)])).hexdigest()[:16]


class Disk:
    """The image ``path``, and the folder of kernels beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / f"root-{_key()}.img"
        self._tree = folder / f"root-{_key()}"

    def prepare(self, kernels: list[Kernel], apt: Apt, say: Say) -> None:
        """Make whatever of the image and the kernels is missing. Raises BuildError."""
        missing = [kernel for kernel in kernels if not self.initrd(kernel).exists()]
        if self.path.exists() and not missing:
            return
        if not self._tree.exists():
            self._forget_old()
            say("making the root file system: about three minutes")
            _make_tree(self._tree, self._folder / "build.log")
        self.path.unlink(missing_ok=True)  # it lacks their modules: where this is interrupted, it must not serve
        for kernel in missing:
            say(f"unpacking {kernel.release}")
            self._add(kernel, apt)
        say("making the disk image")
        aside = self.path.with_suffix(".new")
        with aside.open("wb") as image:
            image.truncate(_BYTES)
        _run(self._folder / "build.log", "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1", "-d", self._tree, aside)
        aside.rename(self.path)

    def vmlinuz(self, kernel: Kernel) -> Path:
        """The kernel's image."""
        return self._tree / "kernels" / f"vmlinuz-{kernel.release}"

    def initrd(self, kernel: Kernel) -> Path:
        """Its initrd."""
        return self._tree / "kernels" / f"initrd-{kernel.release}"

    def _forget_old(self) -> None:
        for old in self._folder.glob("root-*"):
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()

    def _add(self, kernel: Kernel, apt: Apt) -> None:
        """Unpack a kernel's modules into the tree, and put its image and initrd beside them."""
        log, release = self._folder / "build.log", kernel.release
        packages, unpacked = self._folder / "packages", self._folder / f"unpacked-{release}"
        packages.mkdir(exist_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)
        for package in kernel.packages:
            _run(log, "dpkg-deb", "-x", apt.download(package, packages), unpacked)
        modules = next(
            iter([*unpacked.glob("lib/modules/*/kernel"), *unpacked.glob("usr/lib/modules/*/kernel")])
        ).parent
        image = next(iter([*unpacked.glob(f"boot/vmlinuz-{release}"), *modules.glob("vmlinuz")]))
        target = self._tree / "usr/lib/modules" / release
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(modules, target, symlinks=True)
        _run(log, "chroot", self._tree, "/sbin/depmod", release)
        self.vmlinuz(kernel).parent.mkdir(exist_ok=True)
        shutil.copyfile(image, self.vmlinuz(kernel))
        order = initrd.load_order((target / "modules.dep").read_text())
        contents = {path: _decompressed(target / path) for path in order}
        aside = self.initrd(kernel).with_suffix(".new")
        aside.write_bytes(initrd.initrd((self._tree / "bin/busybox").read_bytes(), contents))
        aside.rename(self.initrd(kernel))  # the last step: it is what says that the kernel is here
        shutil.rmtree(unpacked)


def _decompressed(module: Path) -> bytes:
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data


def _run(log: Path, *words: str | Path, environment: dict[str, str] | None = None) -> None:
    with log.open("ab") as file:
        done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, words[:3]))} failed, see {log}")


def _make_tree(tree: Path, log: Path) -> None:
    aside = tree.with_name(f"{tree.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    log.unlink(missing_ok=True)
    include = ",".join(f"{_PACKAGES} {_PACKAGES_OF_OURS} {_ROOTLESS}".split())
    _run(log, "debootstrap", "--variant=minbase", f"--include={include}", "bookworm", aside, mirror())
    for name in ("resolv.conf", "hosts", "ssl/certs/ca-certificates.crt"):
        if Path("/etc", name).exists():
            shutil.copyfile(Path("/etc", name), aside / "etc" / name)
    _install(aside / "usr/sbin/policy-rc.d", "policy-rc.d")
    _copy_project(aside / PROJECT)
    # Its own mounts, in a namespace that goes with it.
    _run(log, "unshare", "--mount", FILES / "in-chroot", aside, f"/{PROJECT}/.ci/setup", environment=_environment())
    (aside / "usr/sbin/policy-rc.d").unlink()
    _settle(aside, log)
    aside.rename(tree)


def _environment() -> dict[str, str]:
    """Of the set-up in the root file system: pip's certificates are where they were copied, its other settings are this
    machine's own.
    """
    kept = {name: value for name, value in os.environ.items() if name.lower() in _PROXIES}
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "PIP_CERT": certificates,
        "SSL_CERT_FILE": certificates,
        **kept,
    }


def _copy_project(target: Path) -> None:
    target.mkdir(parents=True)
    for name in project_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def project_files() -> list[str]:
    """The checkout's files, with those that are new and not ignored."""
    # The folder is named safe: root may well not be its owner, and git refuses then.
    words = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in found if name and os.path.lexists(ROOT / name)]


def _install(path: Path, name: str, mode: int = 0o755) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FILES / name, path)
    path.chmod(mode)


def _settle(tree: Path, log: Path) -> None:
    """What makes a bootable machine of it, that runs the job and nothing else."""
    (tree / "etc/hostname").write_text("graft-guest\n")
    (tree / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
    (tree / "etc/machine-id").write_text("")
    with (tree / "etc/hosts").open("a") as hosts:
        hosts.write("127.0.1.1 graft-guest\n")
    _install(tree / "usr/local/sbin/graft-job", "graft-job")
    _install(tree / "etc/systemd/system/graft-job.service", "graft-job.service", 0o644)
    for unit in f"{_SERVERS} {_TIMERS} {_AT_BOOT}".split():
        subprocess.run(["chroot", tree, "systemctl", "disable", "-q", unit], capture_output=True)
    _run(log, "chroot", tree, "systemctl", "mask", "-q", "e2scrub_reap.service", "e2scrub_all.timer")
    _run(log, "chroot", tree, "systemctl", "enable", "-q", "graft-job.service")
    _run(log, "chroot", tree, "systemctl", "set-default", "-q", "multi-user.target")
