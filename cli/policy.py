"""`graft policy`: check a policy before it is used."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import command

if TYPE_CHECKING:
    from graft.policy_file import Examined

app = typer.Typer(help="Policies: what a container may do on the host's stack.", no_args_is_help=True)


@app.callback()
def _policy() -> None:
    """Keep `check` a command of its own: Typer would merge a single one into the group."""


@app.command()
@command
def check(
    file: Annotated[Path, typer.Argument(help="The policy.", metavar="FILE")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say whether FILE can be applied, and if not, every reason with its line and field."""
    from graft.policy_file import examine_policy, read_policy  # slow to import: pydantic and yaml
    from graft.store import known_endpoints

    examined = examine_policy(read_policy(file), known_endpoints())
    typer.echo(_as_json(str(file), examined) if as_json else _as_text(str(file), examined))
    if examined.problems:
        raise typer.Exit(2)


def _as_text(file: str, examined: Examined) -> str:
    policy, rules = examined.policy, examined.ruleset
    if policy is None or rules is None:
        return "\n".join(problem.format(file) for problem in examined.problems)
    counts = f"{len(policy.ingress)} ingress, {len(policy.egress)} egress rules, {rules.entries} map entries"
    return f"{file}: ok ({counts})"


def _as_json(file: str, examined: Examined) -> str:
    policy, rules = examined.policy, examined.ruleset
    result: dict[str, object] = {"file": file, "ok": policy is not None}
    if policy is not None and rules is not None:
        counts = {"ingress": len(policy.ingress), "egress": len(policy.egress), "entries": rules.entries}
        result |= {"policy": policy.name, **counts}
    result["problems"] = [asdict(problem) for problem in examined.problems]
    return json.dumps(result, indent=2)
