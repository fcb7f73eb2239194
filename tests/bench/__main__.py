"""`python -m tests.bench`: what `graft bench` measures, into build/ and docs/performance.md."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from graft.bench import chart, report, tables
from graft.bench.command import CASES, measure, raise_if_failed
from graft.bench.options import Wishes, choose
from graft.bench.workloads import WORKLOADS
from graft.errors import GraftError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "performance.md"
BUILD = ROOT / "build"


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; gives the exit status."""
    options = _options(arguments)
    wishes = Wishes(rounds=options.rounds, seconds=options.seconds, cases=options.cases, workloads=options.workloads)
    command = shlex.join(["make", "bench", *([f"BENCH={shlex.join(arguments)}"] if arguments else [])])
    try:
        chosen = choose(wishes, CASES, WORKLOADS)
        results = measure(chosen, command, Console())
        is_whole = chosen.cases == list(CASES) and chosen.workloads == list(WORKLOADS) and bool(chosen.rules)
        _write(results, is_whole and not options.no_document)
        raise_if_failed(results)
    except GraftError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bench: interrupted; everything is cleaned up", file=sys.stderr)
        return 130
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure what programs pay for the network.")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (5)")
    parser.add_argument("--seconds", type=float, default=2, help="how long each measurement takes (2)")
    parser.add_argument("--cases", help="some, with commas")
    parser.add_argument("--workloads", help="some, with commas; rules and containers too")
    parser.add_argument("--no-document", action="store_true", help="leave docs/performance.md as it is")
    return parser.parse_args(arguments)


def _write(results: report.Results, is_for_document: bool) -> None:
    table = tables.as_markdown(results)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "bench.json").write_text(json.dumps(report.as_json(results), indent=2) + "\n")
    chart.draw(results, BUILD / "bench.svg")
    print(f"\n{table}\n")
    if not is_for_document:
        print("written: build/bench.json, build/bench.svg (docs/performance.md is for whole runs)")
        return
    chart.draw(results, DOCUMENT.with_suffix(".png"))
    DOCUMENT.write_text(tables.with_table(DOCUMENT.read_text() if DOCUMENT.exists() else "", table))
    print("written: build/bench.json, build/bench.svg, docs/performance.md, docs/performance.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
