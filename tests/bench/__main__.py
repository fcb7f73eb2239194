"""`python -m tests.bench`: measure, and write build/bench.json and docs/performance.md."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console

import graft
from tests.bench import report
from tests.bench.bypass4netns import BypassCase
from tests.bench.cases import BRIDGE_PORT, INNER_PORT, Case
from tests.bench.cases import CASES as PLAIN_CASES
from tests.bench.process import BenchError
from tests.bench.relays import RELAYS
from tests.bench.runner import measure_all
from tests.bench.topology import topology
from tests.bench.usernet import USERNETS
from tests.bench.workloads import WORKLOADS, Place, Workload, build_peer

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "performance.md"
BUILD = ROOT / "build"

CASES: tuple[Case, ...] = (*PLAIN_CASES, *RELAYS, BypassCase(), *USERNETS)

Item = TypeVar("Item")


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; gives the exit status."""
    options = _options(arguments)
    console = Console()
    errors = Console(stderr=True)
    if os.geteuid() != 0:
        errors.print("bench: needs root: it makes network namespaces", highlight=False)
        return 5
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measurements = _measure(options, console)
    except BenchError as error:
        errors.print(f"bench: {error}", highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        errors.print("bench: interrupted; everything is cleaned up", highlight=False)
        return 130
    _write(options, measurements, console)
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure what programs pay for the network.")
    parser.add_argument("--rounds", type=_positive, default=5, help="how often everything is measured (5)")
    parser.add_argument("--seconds", type=_positive, default=2, help="how long each measurement takes (2)")
    parser.add_argument("--cases", type=_some(CASES, lambda case: case.name), default=list(CASES))
    parser.add_argument("--workloads", type=_some(WORKLOADS, lambda work: work.metric.name), default=list(WORKLOADS))
    parser.add_argument("--no-document", action="store_true", help="leave docs/performance.md as it is")
    options = parser.parse_args(arguments)
    options.command = shlex.join(["make", "bench", *([f"BENCH={shlex.join(arguments)}"] if arguments else [])])
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number from 1 on")
    return number


def _some(items: Sequence[Item], name: Callable[[Item], str]) -> Callable[[str], list[Item]]:
    """A parser of lists of names with commas; keeps the order of ``items``."""

    def parse(text: str) -> list[Item]:
        wanted = set(text.split(","))
        unknown = wanted - {name(item) for item in items}
        if unknown:
            known = ", ".join(name(item) for item in items)
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {known}")
        return [item for item in items if name(item) in wanted]

    return parse


def _measure(options: argparse.Namespace, console: Console) -> report.Measurements:
    workloads: list[Workload] = options.workloads
    cases: list[Case] = options.cases
    with (
        tempfile.TemporaryDirectory(prefix="graft-bench-") as folder,
        topology(public=BRIDGE_PORT, inner=INNER_PORT) as net,
    ):
        workdir = Path(folder)
        place = Place(net, workdir, build_peer(workdir), options.seconds)
        return measure_all(workloads, cases, place, options.rounds, console)


def _write(options: argparse.Namespace, measurements: report.Measurements, console: Console) -> None:
    metrics = [workload.metric for workload in options.workloads]
    columns = [report.Column(case.name, case.title, case.wanted) for case in options.cases]
    run = report.Run(
        command=options.command,
        date=datetime.date.today().isoformat(),
        kernel=platform.release(),
        machine=f"{os.cpu_count()} cores, {platform.machine()}",
        version=graft.__version__,
        rounds=options.rounds,
        seconds=options.seconds,
    )
    table = report.as_markdown(run, metrics, columns, measurements)
    BUILD.mkdir(exist_ok=True)
    data = report.as_json(run, metrics, columns, measurements)
    (BUILD / "bench.json").write_text(json.dumps(data, indent=2) + "\n")
    from tests.bench import chart  # matplotlib takes a second to import

    chart.draw(metrics, columns, report.summaries(metrics, columns, measurements), BUILD / "bench.svg")
    console.print(f"\n{table}\n", highlight=False, markup=False, soft_wrap=True)
    written = "build/bench.json, build/bench.svg"
    if options.no_document or len(metrics) < len(WORKLOADS) or len(columns) < len(CASES):
        console.print(f"written: {written} (docs/performance.md is for whole runs)", highlight=False, soft_wrap=True)
        return
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    DOCUMENT.write_text(report.with_table(text, table))
    console.print(f"written: {written}, docs/performance.md", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
