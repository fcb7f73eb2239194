"""`python -m tests.vm [JOB] [--kernels ...]`: see the package."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.vm import qemu, report
from tests.vm.apt import Apt, AptError
from tests.vm.disk import ROOT, BuildError, Disk, cache_folder, project_files
from tests.vm.kernels import Kernel, NoSuchKernel, choose, listed
from tests.vm.qemu import Job, Machine
from tests.vm.report import Result

BUILD = ROOT / "build" / "test-kernels"
_JOBS = Path(__file__).with_name("jobs")
_SECONDS = {"whole": 5400.0, "units": 900.0, "quick": 600.0, "refusal": 600.0, "helpers": 600.0, "package": 4500.0}
_DEFAULT = "6.1 6.12 newest"
_TOOLS = ("qemu-system-x86_64", "debootstrap", "mkfs.ext4")


def main(arguments: Sequence[str]) -> int:
    """Give the exit status: 1 where any kernel fails."""
    options = _options(arguments)
    if os.geteuid() != 0:
        return _fail("this needs root: it makes a root file system", 5)
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return _fail(f"missing {', '.join(missing)}: .ci/setup vm installs them", 1)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        apt = Apt(folder / "apt")
        _say("fetching the lists of kernels")
        apt.update()
        kernels = choose(options.kernels.split(), listed(apt.kernel_packages()))
        disk = Disk(folder)
        disk.prepare(kernels, apt, _say)
        results = _run_all(options.job, kernels, disk, options.guests)
    except (AptError, BuildError, NoSuchKernel) as error:
        return _fail(str(error), 1)
    for result in results:
        _explain(result)
    return 0 if all(result.passed for result in results) else 1


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.vm", description="Run Graft on other kernels, in virtual machines.")
    parser.add_argument("job", nargs="?", default="whole", choices=("whole", "quick", "units", "helpers", "package"))
    parser.add_argument("--kernels", default=_DEFAULT, help=f'beginnings of releases, or "newest"; default: {_DEFAULT}')
    parser.add_argument(
        "--guests", type=int, default=os.cpu_count() or 1, help="how many at a time; default: a core each"
    )
    return parser.parse_args(arguments)


def _job(name: str, kernel: Kernel) -> Job:
    """``name``, or for a kernel that is too old the test that it is refused."""
    name = name if kernel.is_supported or name == "helpers" else "refusal"
    return Job(name, _JOBS / name, _SECONDS[name], reboots=name == "package")


def _run_all(name: str, kernels: Sequence[Kernel], disk: Disk, guests: int) -> list[Result]:
    files = [(file, ROOT / file) for file in project_files()]
    if name == "package":
        files.append(("dist/graft.deb", _package()))
    project = qemu.packed(files)

    def one(kernel: Kernel) -> Result:
        job = _job(name, kernel)
        out = BUILD / kernel.release
        _say(f"{kernel.release}: {job.name}, follow it in {out / 'stream.txt'}")
        machine = Machine(disk.path, disk.vmlinuz(kernel), disk.initrd(kernel))
        seconds = qemu.run(machine, job, project, out)
        result = report.read(out, kernel.release, job.name, seconds)
        print(report.line(result), flush=True)
        return result

    with ThreadPoolExecutor(guests) as pool:
        return list(pool.map(one, kernels))


def _package() -> Path:
    """What `make deb` built last. Raises BuildError."""
    found = sorted((ROOT / "dist").glob("graft_*.deb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise BuildError("there is no package in dist/: make deb")
    return found[-1]


def _explain(result: Result) -> None:
    if not result.passed:
        _say(f"{result.kernel}: see {BUILD / result.kernel}")
        for name in report.failures(result):
            _say(f"{result.kernel}: failed: {name}")


def _say(text: str) -> None:
    print(f"test-kernels: {text}", file=sys.stderr, flush=True)


def _fail(text: str, status: int) -> int:
    _say(text)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
