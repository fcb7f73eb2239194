"""`python -m tests.soak --minutes 60 --seed 7`: a soak by itself, and a line for each figure at its end. Root."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path

from tests.conftest import installation
from tests.soak.soak import Report, soak
from tests.support import namespaces
from tests.support.progress import Progress

BUILD = Path(__file__).resolve().parents[2] / "build"


def _print(report: Report) -> None:
    for name, value in dataclasses.asdict(report).items():
        if name != "problems":
            print(f"{name.replace('_', ' ')}: {value}")
    for problem in report.problems:
        print(f"problem: {problem}")
    print("failed" if report.problems else "passed")


def main() -> int:
    """The status: 0 where it passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    words = parser.parse_args()
    progress = Progress()
    with (
        tempfile.TemporaryDirectory(prefix="graft-soak-") as folder,
        namespaces.host_and_client() as (host, client),
        installation(Path(folder), host, client, "soak") as made,
    ):
        made.graft("up")
        report = soak(made, Path(folder) / "work", words.minutes * 60, words.seed, progress.show)
    progress.end()
    BUILD.mkdir(exist_ok=True)
    (BUILD / "soak.json").write_text(json.dumps(dataclasses.asdict(report), indent=1))
    _print(report)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
