"""`graft bench`: it measures what it says, and leaves nothing on the machine, however it ends."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graft.bench.outputs import PERCENTILES
from graft.bench.scratch import BPFFS, NETNS_DIR, RUNS
from graft.kernel import cgroup
from tests.support.installation import GRAFT
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("root")]

SHORT = ("--rounds", "1", "--seconds", "0.1", "--json", "-")


def left(pid: int) -> list[str]:
    """What a run has on the machine."""
    name = f"graft-bench-{pid}"
    return sorted(
        str(path)
        for folder in (RUNS, NETNS_DIR, BPFFS, cgroup.v2_mount())
        for path in folder.glob(f"{name}*")
        if path.name == name or path.name.startswith(f"{name}-")
    )


@contextmanager
def bench(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`graft bench`, as it runs."""
    with subprocess.Popen(
        [GRAFT, "bench", *SHORT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def is_measuring(process: subprocess.Popen[str]) -> bool:
    """Whether a program runs that was attached: everything that a run makes is there then."""
    assert process.poll() is None, process.communicate()
    return cgroup.populated(cgroup.v2_mount() / f"graft-bench-{process.pid}" / "direct")


def test_a_quick_run_has_every_figure_and_leaves_nothing() -> None:
    chosen = ("--cases", "host,direct,swap", "--workloads", "pingpong,connect,rules")
    with bench("--quick", *chosen) as process:
        output, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert left(process.pid) == []
    found = json.loads(output)
    assert found["not_measured"] == []
    kinds = {name: ("", *(f"-{one}" for one in PERCENTILES), "-cpu") for name in ("pingpong", "connect")}
    figures = {one["name"]: one["cases"] for one in found["workloads"]}
    assert list(figures) == [f"{name}{kind}" for name, parts in kinds.items() for kind in parts]
    for cases in figures.values():
        assert set(cases) == {"host", "direct", "swap"}
        assert all(case["median"] > 0 for case in cases.values())
        assert cases["host"]["ratio"] is None and cases["swap"]["ratio"]["median"] > 0
    (growth,) = found["growth"]
    assert [point["count"] for point in growth["points"]] == [1, 10000]
    assert "3 cases" in said and "nothing is begun after" in said


def test_an_interrupted_run_leaves_nothing() -> None:
    with bench("--cases", "direct", "--seconds", "60", "--workloads", "pingpong") as process:
        until("measuring", lambda: is_measuring(process), 60)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        output, said = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert said.endswith("graft: interrupted; all that it made is removed\n")
    assert left(process.pid) == []


def test_the_next_run_removes_what_a_killed_one_left() -> None:
    with bench("--cases", "direct", "--seconds", "60", "--workloads", "pingpong") as process:
        until("measuring", lambda: is_measuring(process), 60)
        process.kill()
        process.wait()
    assert len(left(process.pid)) > 3
    inside = cgroup.v2_mount() / f"graft-bench-{process.pid}"
    assert cgroup.populated(inside), "control: its programs run on"
    with bench("--cases", "host", "--workloads", "pingpong") as following:
        _, said = following.communicate(timeout=60)
    assert following.returncode == 0, said
    assert left(process.pid) == left(following.pid) == []


def test_a_run_beside_another_one_leaves_it_alone(tmp_path: Path) -> None:
    with bench("--cases", "host", "--seconds", "60", "--workloads", "pingpong") as process:
        until("begun", lambda: len(left(process.pid)) > 3, 60)
        with bench("--cases", "host", "--workloads", "pingpong") as other:
            _, said = other.communicate(timeout=60)
        assert other.returncode == 0, said
        assert len(left(process.pid)) > 3
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert left(process.pid) == []


def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [GRAFT, "bench", "--json", tmp_path / "missing" / "file"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("graft: --json: cannot write ")


def test_a_picture_of_another_kind_is_refused() -> None:
    done = subprocess.run([GRAFT, "bench", "--plot", "bench.doc"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bench.doc" in done.stderr and ".png" in done.stderr
