"""One guest: QEMU boots a kernel with the root disk, and a job's results come out.

The root disk is used as a snapshot, so that every run finds it as it was made. The job, with the checkout, is a tar on
a disk of its own, and so are the results: no network, no shared folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from graft.kernel.syscalls import syscall

_SECTOR = 512
_RESULT_BYTES = 64 << 20
_MEGABYTES = 3072
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ARGUMENTS = (
    "console=ttyS0 panic=-1 net.ifnames=0 mitigations=off nokaslr systemd.show_status=0 random.trust_cpu=on "
    "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all"
)


@dataclass(frozen=True, slots=True)
class Job:
    """A script that runs in a guest's checkout, and how many seconds it has.

    ``reboots``: it may leave /out/reboot, and is run again after the guest's next boot.
    """

    name: str
    script: Path
    seconds: float
    reboots: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """What a guest boots from."""

    disk: Path
    vmlinuz: Path
    initrd: Path


def packed(files: Iterable[tuple[str, Path]]) -> bytes:
    """The checkout as a tar: made once, so that every guest has the same however long the run takes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, path in files:
            tar.add(path, name, recursive=False)
    return buffer.getvalue()


def job_disk(script: bytes, project: bytes) -> bytes:
    """The tar that a guest finds on its job disk: the script and the packed project."""
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as tar:
        for name, data in (("project.tar", project), ("job", script)):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    whole = outer.getvalue()
    return whole + bytes(-len(whole) % _SECTOR)


def run(machine: Machine, job: Job, project: bytes, out: Path) -> float:
    """Run ``job`` in a guest and unpack its results into ``out``; gives the seconds that it took.

    A guest that is not done in time is ended; ``out`` then has its console and what it had printed.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    entry, results = out / "job.raw", out / "results.raw"
    entry.write_bytes(job_disk(job.script.read_bytes(), project))
    with results.open("wb") as file:
        file.truncate(_RESULT_BYTES)
    started = time.monotonic()
    process = subprocess.Popen(
        _command(machine, job, entry, results, out),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(out / "qemu.txt").open("wb"),
        preexec_fn=_below,
    )
    try:
        process.wait(job.seconds)
    except subprocess.TimeoutExpired:
        (out / "timeout").write_text(f"{job.seconds:.0f}\n")
    finally:
        process.kill()
        process.wait()
        entry.unlink()
    unpack(results, out)
    results.unlink()
    return time.monotonic() - started


def unpack(results: Path, out: Path) -> None:
    """The files that a guest left; one that was ended left none."""
    with contextlib.suppress(tarfile.ReadError), tarfile.open(results) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                (out / Path(member.name).name).write_bytes(content.read())


def _below() -> None:
    """Of a guest's process: it yields to everything else, and goes when this one does."""
    os.nice(10)
    syscall("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)


def _command(machine: Machine, job: Job, entry: Path, results: Path, out: Path) -> list[str]:
    words = "qemu-system-x86_64 -M q35 -accel tcg,tb-size=512 -cpu max -smp 1 -nodefaults -display none"
    command = [*words.split(), "-m", str(_MEGABYTES), *([] if job.reboots else ["-no-reboot"])]
    command += ["-serial", f"file:{out / 'console.txt'}", "-serial", f"file:{out / 'stream.txt'}"]
    command += ["-kernel", str(machine.vmlinuz), "-initrd", str(machine.initrd), "-append", _ARGUMENTS]
    for name, file, options in (
        ("root", machine.disk, "snapshot=on"),
        ("job", entry, "readonly=on"),
        ("out", results, ""),
    ):
        drive = f"file={file},format=raw,if=none,id={name}" + (f",{options}" if options else "")
        command += ["-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial={name}"]
    return command
