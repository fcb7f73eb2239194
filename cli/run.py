"""`graft run`: runs a program under Graft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.kernel.credentials import require_root
from graft.model.settings import Settings

from .options import Deny, Egress, Ingress, PolicyFile
from .output import command


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(context_settings={"allow_interspersed_args": False})(run)


@command
def run(
    context: typer.Context,
    program: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The program and its arguments.")],
    ingress: Ingress = None,
    egress: Egress = None,
    deny: Deny = False,
    policy: PolicyFile = None,
    net: Annotated[
        str, typer.Option("--net", metavar="new|PATH", help="Its network namespace: a new one, or that of PATH.")
    ] = "new",
    user: Annotated[str | None, typer.Option("--user", metavar="USER[:GROUP]", help="Run it as this user.")] = None,
    keep_net_admin: Annotated[
        bool,
        typer.Option(
            "--allow-net-admin", help="Do not remove CAP_NET_ADMIN from a program of root (docs/security.md)."
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log each intercepted call.")] = False,
) -> None:
    """Run a program in a network namespace of its own, with the granted sockets on the host's stack."""
    from graft.commands.policy_source import network, policy_of
    from graft.commands.run import RunPlan
    from graft.commands.run import run as run_program
    from graft.kernel import process
    from graft.state.installation import Installation

    require_root()
    settings = Settings.from_environment()
    plan = RunPlan(
        command=tuple(program),
        policy=policy_of(settings, Path(program[0]).name, policy, ingress or [], egress or [], deny),
        net=network(net),
        user=process.parse_user(user) if user is not None else None,
        keep_net_admin=keep_net_admin,
        verbose=verbose,
    )
    graft = Installation.open(settings)
    if context.obj is not None:
        from graft.commands import run_job

        run_job.start(context.obj, graft, plan)
        return
    status = run_program(graft, plan)
    if status < 0:
        process.die_by_signal(-status)
    raise SystemExit(status)
