"""`python -m tests.fuzz`: sequences for some time, or one again that failed. Root.

python -m tests.fuzz --seconds 120 --seed 7 --transport swap,direct
python -m tests.fuzz --replay build/fuzz/direct-7.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence as Several
from pathlib import Path
from typing import get_args

from tests.conftest import installation
from tests.fuzz.arena import arena
from tests.fuzz.generate import generate
from tests.fuzz.judge import Finding
from tests.fuzz.model import TRANSPORTS, Sequence, Transport
from tests.fuzz.run import Runner, Tally, runner
from tests.fuzz.shrink import shrink
from tests.hostile.conftest import graft_without
from tests.hostile.undefended import DEFENCES
from tests.support import namespaces
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.progress import Progress
from tests.support.shell import run

BUILD = Path(__file__).resolve().parents[2] / "build" / "fuzz"


def save(sequence: Sequence, found: Several[Finding], folder: Path = BUILD) -> Path:
    """A file to replay."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{sequence.transport}-{sequence.seed}.json"
    file.write_text(sequence.to_json())
    file.with_suffix(".txt").write_text("".join(f"{one}\n" for one in found))
    return file


def smallest(made: Runner, sequence: Sequence, found: Several[Finding], seconds: float = 60) -> Sequence:
    """What still shows a finding of the same rule of the judge's, within that time. Races are tried twice."""
    wanted, end = {one.rule for one in found}, time.monotonic() + seconds

    def fails(one: Sequence) -> bool:
        return time.monotonic() < end and any(wanted & {each.rule for each in made.run(one)} for _ in range(2))

    return shrink(sequence, fails)


def fuzz(
    host: Host,
    programs: Programs,
    folder: Path,
    transport: Transport,
    seconds: float,
    seed: int,
    most: int = sys.maxsize,
) -> Tally:
    """Sequences of that transport, from ``seed`` on: for that time, ``most`` of them. Those that fail are shrunk and
    saved.
    """
    progress, end = Progress(), time.monotonic() + seconds
    first = generate(seed, transport)
    with arena(host, transport, first.world, programs, folder) as made, runner(made) as running:
        tally = running.tally
        while time.monotonic() < end and tally.sequences < most:
            sequence = generate(seed, transport)
            found = running.run(sequence)
            if found:
                tally.failed += 1
                progress.end()
                for one in found:
                    print(f"{transport}, seed {seed}: {one}", flush=True)
                running.tally = Tally()
                print(f"  {save(smallest(running, sequence, found), found)}", flush=True)
                running.tally = tally
            seed += 1
            progress.show(f"{transport}: {tally.sequences} sequences, {tally.calls} calls, {tally.failed} failures")
        progress.end()
        return tally


def replay(host: Host, programs: Programs, folder: Path, sequence: Sequence, times: int = 1) -> list[Finding]:
    """The findings of a sequence, of the first of so many runs that has any."""
    with arena(host, sequence.transport, sequence.world, programs, folder) as made, runner(made) as running:
        return next((found for _ in range(times) if (found := running.run(sequence))), [])


def bring_up(host: Host, without: str | None) -> None:
    """`graft up`, of a Graft that lacks a defence where one is named."""
    if without is None:
        host.graft("up")
    else:
        run([*graft_without(without), "up"], environment=host.environment, status=0)


def _transports(text: str) -> tuple[Transport, ...]:
    chosen = tuple(one for one in TRANSPORTS if one in text.split(","))
    if len(chosen) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"of {', '.join(get_args(Transport))}")
    return chosen


def main() -> int:
    """0 where nothing failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--seconds", type=float, default=120, help="for all transports together (default: 120)")
    parser.add_argument("--seed", type=int, default=1, help="the first sequence's (default: 1)")
    parser.add_argument(
        "--transport", type=_transports, default=TRANSPORTS, metavar="LIST", help="swap,born,direct,splice"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run that sequence, and nothing else")
    parser.add_argument("--times", type=int, default=3, help="how often a replay is tried (default: 3)")
    parser.add_argument("--without", choices=sorted(DEFENCES), help="leave out a defence: the judge should find it")
    chosen = parser.parse_args()
    namespaces.sweep()
    with tempfile.TemporaryDirectory(prefix="graft-fuzz-") as name, namespaces.host_and_client() as net:
        folder = Path(name)
        folder.chmod(0o755)
        programs = Programs(folder)
        with installation(folder, *net, "fuzz") as host:
            bring_up(host, chosen.without)
            if chosen.replay:
                found = replay(host, programs, folder, Sequence.from_json(chosen.replay.read_text()), chosen.times)
                for one in found:
                    print(one)
                print(f"{len(found)} findings")
                return 1 if found else 0
            failed = 0
            for transport in chosen.transport:
                share = chosen.seconds / len(chosen.transport)
                tally = fuzz(host, programs, folder, transport, share, chosen.seed)
                failed += tally.failed
                print(f"{transport}: {tally}", flush=True)
            return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
