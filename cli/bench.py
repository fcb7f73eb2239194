"""`graft bench`: what programs pay for the network on this machine, with and without Graft."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.errors import UsageError
from graft.kernel.credentials import require_root

from . import completion
from .output import command, listing, warn

if TYPE_CHECKING:
    from graft.bench.report import Results


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(bench)


Quick = Annotated[
    bool, typer.Option("--quick", help="About a minute: Graft's transports, few workloads, short rounds.")
]
Minutes = Annotated[
    float | None,
    typer.Option(
        "--time", metavar="MINUTES", min=0.1, help="Begin no measurement after that time.", show_default=False
    ),
]
Rounds = Annotated[
    int | None, typer.Option("--rounds", min=1, help="How often all is measured.", show_default="5, quick 3")
]
Seconds = Annotated[
    float | None,
    typer.Option("--seconds", min=0.05, help="How long each measurement takes.", show_default="1, quick 0.3"),
]
Cases = Annotated[
    str | None,
    typer.Option(
        "--cases",
        metavar="NAME,...",
        help="Only these cases, and the host.",
        autocompletion=completion.bench_cases,
    ),
]
Workloads = Annotated[
    str | None,
    typer.Option(
        "--workloads",
        metavar="NAME,...",
        help="Only these workloads, or rules, or containers (growth).",
        autocompletion=completion.bench_workloads,
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON; - prints them.")
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw them (.png, .svg, .pdf); needs matplotlib.")
]


@command
def bench(
    quick: Quick = False,
    minutes: Minutes = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    cases: Cases = None,
    workloads: Workloads = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Measure what a program pays for the network: on the host, behind a bridge with NAT, in Graft's transports, and
    through other programs that publish ports, those that are installed.

    All of it runs in network namespaces that are made for it, with an installation of Graft apart from this machine's;
    both are removed at the end. Throughput, latency (p50, p90, p99, p99.9), connection rates, CPU time, and the cost of
    a call with up to 10,000 rules and 200 containers. Each figure is compared with the host's of the same round.

    CPU time is that of the cgroup in which everything is started: server, client, and what is between them. The
    kernel's own threads are not in it.
    """
    from rich.console import Console

    from graft.bench import command as whole
    from graft.bench.options import Wishes, choose
    from graft.bench.workloads import WORKLOADS

    options = choose(Wishes(quick, minutes, rounds, seconds, cases, workloads), whole.CASES, WORKLOADS)
    require_root()
    draws = plot is not None and _can_draw(plot)
    _check_folder("--json", None if json_file == Path("-") else json_file)
    _check_folder("--plot", plot)
    try:
        results = whole.measure(options, shlex.join(["graft", *sys.argv[1:]]), Console(stderr=True))
    except KeyboardInterrupt:
        warn("graft: interrupted; all that it made is removed")
        raise SystemExit(130) from None
    _show(results, json_file)
    if draws and plot is not None:
        from graft.bench import chart

        chart.draw(results, plot)
        warn(f"graft: {plot} is written")
    whole.raise_if_failed(results)


def _can_draw(plot: Path) -> bool:
    """Whether there is matplotlib; says so if not. Raises UsageError for a file of another kind."""
    from graft.bench import pictures

    if plot.suffix not in pictures.SUFFIXES:
        raise UsageError(f"--plot: {str(plot)!r} is no name of a picture", f"FILE{', FILE'.join(pictures.SUFFIXES)}")
    if pictures.is_available():
        return True
    warn("graft: --plot: matplotlib is not installed, so nothing is drawn (apt-get install python3-matplotlib)")
    return False


def _check_folder(field: str, file: Path | None) -> None:
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UsageError(f"{field}: cannot write {str(file)!r}", "a file in a folder that exists")


def _show(results: Results, json_file: Path | None) -> None:
    from graft.bench import bars, report

    text = json.dumps(report.as_json(results), indent=2)
    if json_file == Path("-"):
        print(text)
        return
    if json_file is not None:
        json_file.write_text(text + "\n")
        warn(f"graft: {json_file} is written")
    if not sys.stdout.isatty():
        listing(bars.TITLE, bars.rows(results), [], as_json=False)
        return
    from rich.console import Console

    Console().print(*bars.tables(results), sep="\n")
