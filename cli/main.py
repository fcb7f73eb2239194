"""The typer application, with all commands."""

from __future__ import annotations

import os

import typer

from graft import __version__

from . import attach, bench, daemon, doctor, ep, explain, metrics, policy, ps, run, runtime, state, system, top, trace

COMPLETION = "_GRAFT_COMPLETE"
"""In the environment by a shell that completes a command line: typer's name for it."""

app = typer.Typer(
    name="graft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sockets of a container, served by the host's network stack.",
)
app.add_typer(ep.app, name="ep", help="Endpoints: named addresses of the host's stack.")
app.add_typer(policy.app, name="policy", help="Policies: what a container may do on the host's stack.")
app.add_typer(
    runtime.app,
    name="runtime",
    help="The OCI runtime: gives it to an engine, or runs it (engines do that as graft-runtime).",
)
run.register(app)
runtime.register(app)
attach.register(app)
ps.register(app)
trace.register(app)
explain.register(app)
metrics.register(app)
top.register(app)
system.register(app)
state.register(app)
daemon.register(app)
doctor.register(app)
bench.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"graft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Sockets of a container, served by the host's network stack."""


def main() -> None:
    """The entry point of the command graft."""
    if os.environ.get(COMPLETION):  # a shell asks; otherwise its classes are not imported
        from . import completion

        completion.init()
    app(prog_name="graft")
