"""What a guest left, as one line that a script can read. Pure, but for reading the results' folder."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TESTS = {"kernel": "kernel_tests", "e2e": "e2e", "units": "units", "before": "before_reboot", "after": "after_reboot"}
_STEPS = ("up", "down", "demo", "doctor", "helpers", *_TESTS)


@dataclass(frozen=True, slots=True)
class Suite:
    """The count of one run of pytest; ``failed`` has the names of those that did not pass."""

    total: int
    skipped: int
    failed: tuple[str, ...]

    @property
    def passed(self) -> int:
        """How many did their work."""
        return self.total - self.skipped - len(self.failed)


@dataclass(frozen=True, slots=True)
class Result:
    """A guest's results. ``status`` is the job's own, None where it did not come to its end."""

    kernel: str
    job: str
    status: int | None
    seconds: float
    steps: Mapping[str, int] = field(default_factory=dict)
    tests: Mapping[str, Suite] = field(default_factory=dict)
    timed_out: bool = False

    @property
    def passed(self) -> bool:
        """Whether all of it went well."""
        return self.status == 0


def count(junit: str) -> Suite:
    """The tests of a report in JUnit's format."""
    cases = list(ElementTree.fromstring(junit).iter("testcase"))
    skipped = sum(1 for case in cases if case.find("skipped") is not None)
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return Suite(len(cases), skipped, tuple(failed))


def read(folder: Path, kernel: str, job: str, seconds: float) -> Result:
    """The results of a guest that left them in ``folder``."""
    status = folder / "status"
    steps = {name: folder / f"{name}.status" for name in _STEPS}
    reports = {name: folder / f"{name}.xml" for name in _TESTS}
    return Result(
        kernel,
        job,
        int(status.read_text()) if status.exists() else None,
        seconds,
        {name: int(file.read_text()) for name, file in steps.items() if file.exists()},
        {name: count(file.read_text()) for name, file in reports.items() if file.exists()},
        (folder / "timeout").exists(),
    )


def line(result: Result) -> str:
    """kernel=6.1.0-56-cloud-amd64 job=whole result=pass demo=pass ... seconds=812"""
    outcome = "pass" if result.passed else "timeout" if result.timed_out else "fail"
    words = [f"kernel={result.kernel}", f"job={result.job}", f"result={outcome}"]
    if result.job != "refusal":
        words += [
            f"{name}={'fail' if status else 'pass'}" for name, status in result.steps.items() if name not in _TESTS
        ]
        words += [f"{_TESTS[name]}=none" for name in result.steps if name in _TESTS and name not in result.tests]
    words += [f"{_TESTS[name]}_status={status}" for name, status in result.steps.items() if _ended(name, status)]
    words += [f"{_TESTS[name]}={one.passed}/{one.total - one.skipped}" for name, one in result.tests.items()]
    if result.tests:
        words.append(f"skipped={sum(one.skipped for one in result.tests.values())}")
    return " ".join([*words, f"seconds={result.seconds:.0f}"])


def _ended(name: str, status: int) -> bool:
    """Whether a run of tests did not come to its end: 1 is pytest's "some failed", 124 timeout(1)'s."""
    return name in _TESTS and status not in (0, 1)


def failures(result: Result) -> Sequence[str]:
    """The names of the steps and tests that failed."""
    names = [
        f"step {name} (status {status})"
        for name, status in result.steps.items()
        if status and (name not in result.tests or _ended(name, status))
    ]
    return [*names, *(name for one in result.tests.values() for name in one.failed)]
