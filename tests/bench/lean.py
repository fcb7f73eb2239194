"""`python -m tests.bench.lean` (`make bench-lean`): memory and CPU time of programs under `graft run`, many at once,
and of containers of the OCI runtime.

Memory is PSS (proc(5), smaps_rollup): a page that several processes share counts for each in equal parts. Counted are
all processes of Graft's, the fork server too, and not the programs, which are `sleep`. CPU time is what cgroup v2
counts (cpu.stat) for everything that is started: the programs too (a `sleep` takes about 1 ms), and the real runtime,
which is measured without Graft as well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from graft.kernel import cgroup
from tests.bench.lean_containers import REAL, Bundles
from tests.support.installation import GRAFT

_TIMEOUT = 300.0
_RUNTIME = GRAFT.with_name("graft-runtime")


class Figures(NamedTuple):
    """Of so many programs at once. Memory in KiB, CPU time in ms, for each program; seconds for all of them."""

    programs: int
    keeper: float
    supervisor: float
    server: float
    start_cpu: float
    end_cpu: float
    start_seconds: float
    end_seconds: float

    @property
    def memory(self) -> float:
        """Of one program."""
        return self.keeper + self.supervisor + self.server


class Place(NamedTuple):
    """An installation for the benchmark, with a cgroup for the commands that it starts."""

    environment: dict[str, str]
    graft: Path
    commands: Path

    def cpu_usec(self) -> int:
        """CPU time of everything in the two cgroups so far."""
        return sum(_cpu_usec(path) for path in (self.graft, self.commands))


def _cpu_usec(path: Path) -> int:
    lines = (path / "cpu.stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("usage_usec"))


@contextlib.contextmanager
def installation() -> Iterator[Place]:
    """An installation of its own, up, with an endpoint; nothing of it is left afterwards."""
    name = f"graft-lean-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix=name) as folder:
        environment = {
            **os.environ,
            "GRAFT_PIN_DIR": f"/sys/fs/bpf/{name}",
            "GRAFT_RUN_DIR": f"{folder}/run",
            "GRAFT_STATE_DIR": f"{folder}/state",
            "GRAFT_CACHE_DIR": f"{folder}/cache",
            "GRAFT_CGROUP": name,
            "GRAFT_RUNTIME": REAL,
            "GRAFT_RUNTIME_CONFIG": f"{folder}/none",
        }
        place = Place(environment, cgroup.v2_mount() / name, cgroup.v2_mount() / f"{name}-commands")
        cgroup.make(place.commands)
        try:
            _graft(place, "up")
            _graft(place, "run", "--", "true")
            _graft(place, "ep", "add", "web", "127.0.0.1:28080")
            yield place
        finally:
            _graft(place, "down", "--force")
            cgroup.remove(place.commands)


def _graft(place: Place, *words: str) -> None:
    subprocess.run([str(GRAFT), *words], env=place.environment, check=True)


def measure(place: Place, count: int) -> Figures:
    """Start so many programs at once, and end them."""
    command = [str(GRAFT), "run", "-i", "0.0.0.0:80=web", "--", "sleep", "10000"]
    began, used = time.monotonic(), place.cpu_usec()
    started = [
        subprocess.Popen(command, env=place.environment, preexec_fn=lambda: cgroup.enter(place.commands))
        for _ in range(count)
    ]
    try:
        _wait_for(lambda: _running(place) == count, started)
        up, started_used = time.monotonic(), place.cpu_usec()
        time.sleep(1)  # what supervisors do ahead of time
        keepers = [_pss(one.pid) for one in started]
        supervisors = [_pss(pid) for pid in cgroup.processes(place.graft / "supervisors")]
        server = [_pss(pid) for pid in cgroup.processes(place.graft / "forks")]
        ending, before = time.monotonic(), place.cpu_usec()
    finally:
        for one in started:
            one.send_signal(signal.SIGTERM)
        for one in started:
            one.wait(_TIMEOUT)
    end_used = place.cpu_usec()
    return Figures(
        count,
        sum(keepers) / count,
        sum(supervisors) / count,
        sum(server) / count,
        (started_used - used) / 1000 / count,
        (end_used - before) / 1000 / count,
        up - began,
        time.monotonic() - ending,
    )


def measure_containers(place: Place, count: int, runtime: str) -> Figures:
    """Start so many containers, one after the other, and end them."""
    parent = f"{place.graft.name}-containers"
    own = cgroup.v2_mount() / parent
    with tempfile.TemporaryDirectory(prefix="graft-lean-") as folder:
        bundles = Bundles(Path(folder), place.environment, parent, lambda words: _command(place, words))
        bundles.prepare()
        names = [f"lean-{os.getpid()}-{number}" for number in range(count)]
        began, used = time.monotonic(), place.cpu_usec()
        for name in names:
            bundles.start(name, runtime)
        time.sleep(1)  # what supervisors do ahead of time
        up, started_used = time.monotonic(), place.cpu_usec() + _cpu_usec(own)
        processes = cgroup.processes(place.graft / "supervisors")
        shims = [_pss(pid) for pid in processes if _parent_name(pid) != "graft-shim"]
        supervisors = [_pss(pid) for pid in processes if _parent_name(pid) == "graft-shim"]
        server = [_pss(pid) for pid in cgroup.processes(place.graft / "forks")]
        ending, before = time.monotonic(), place.cpu_usec()
        for name in names:
            bundles.end(name, runtime)
        _until(lambda: not cgroup.processes(place.graft / "supervisors"))
    end_used = place.cpu_usec()
    with contextlib.suppress(OSError):
        cgroup.remove(own)
    return Figures(
        count,
        sum(shims) / count,
        sum(supervisors) / count,
        sum(server) / count if shims else 0,
        (started_used - used) / 1000 / count,
        (end_used - before) / 1000 / count,
        up - began,
        time.monotonic() - ending,
    )


def _command(place: Place, words: list[str]) -> None:
    subprocess.run(
        words,
        env=place.environment,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: cgroup.enter(place.commands),
    )


def _parent_name(pid: int) -> str:
    with contextlib.suppress(OSError, IndexError):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1]
        return Path(f"/proc/{parent}/comm").read_text().strip()
    return ""


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("lean: something did not end")
        time.sleep(0.02)


def _wait_for(condition: Callable[[], bool], started: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not condition():
        if time.monotonic() > deadline or any(one.poll() is not None for one in started):
            raise SystemExit("lean: a program did not start")
        time.sleep(0.05)


def _running(place: Place) -> int:
    """How many programs run."""
    found = 0
    for folder in place.graft.glob("run-*"):
        for pid in cgroup.processes(folder):
            with contextlib.suppress(OSError):
                found += Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    return found


def _pss(pid: int) -> int:
    """Memory of a process, in KiB; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def table(found: Sequence[tuple[str, Figures]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| what | at once | memory of each, MB (PSS) | `graft run`, or shim | supervisor | share of the fork server "
        "| CPU to start each, ms | to end each, ms | all up after, s | all gone after, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in found:
        memory = [f"{value / 1024:.1f}" for value in (one.memory, one.keeper, one.supervisor, one.server)]
        times = [f"{one.start_cpu:.0f}", f"{one.end_cpu:.0f}", f"{one.start_seconds:.1f}", f"{one.end_seconds:.1f}"]
        lines.append(f"| {' | '.join([name, str(one.programs), *memory, *times])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run it; gives the exit status."""
    parser = argparse.ArgumentParser(prog="make bench-lean", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--counts", default="1,60,200", help="how many programs at once (1,60,200)")
    parser.add_argument("--containers", default="1,20", help="how many containers at once (1,20); 0: none")
    parser.add_argument("--no-server", action="store_true", help="without a fork server")
    options = parser.parse_args(arguments)
    if options.no_server:
        os.environ["GRAFT_NO_FORK_SERVER"] = "1"
    found = []
    with installation() as place:
        for count in map(int, options.counts.split(",")):
            found.append(("`graft run`", measure(place, count)))
        for count in filter(None, map(int, options.containers.split(","))):
            found.append((f"{REAL} alone", measure_containers(place, count, REAL)))
            found.append((f"{REAL} under Graft", measure_containers(place, count, str(_RUNTIME))))
    print(f"Linux {platform.release()}, {os.cpu_count()} cores, {platform.machine()}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
