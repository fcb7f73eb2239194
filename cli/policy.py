"""`graft policy`: checks a policy, shows the policy in force, replaces it; the schema for editors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import completion
from .options import NoSave
from .output import command, progress, say, warn

if TYPE_CHECKING:
    from graft.commands.policy_show import ActiveRule
    from graft.model.endpoint import Endpoint
    from graft.policy.reader import CheckResult

app = typer.Typer(no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="The policy file.", metavar="FILE", autocompletion=completion.policy_files)]


@app.command()
@command
def check(
    file: File,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the rules that it would put in force, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check FILE, and print every error with its line and field."""
    from graft.policy.files import read_policy
    from graft.policy.reader import check_policy  # import time: yaml
    from graft.state.installation import known_endpoints

    known = known_endpoints()
    examined = check_policy(read_policy(file), known)
    rules = _explained(examined, known) if explain else None
    if as_json:
        typer.echo(_as_json(str(file), examined, rules))
    else:
        say(*_as_text(str(file), examined), *_rule_lines(examined, rules))
    if examined.problems:
        raise typer.Exit(2)


def _as_text(file: str, examined: CheckResult) -> list[str]:
    policy, rules = examined.policy, examined.ruleset
    if policy is None or rules is None:
        return [problem.format(file) for problem in examined.problems]
    ingress = len(policy.ingress) + len(policy.unix_ingress)
    counts = f"{ingress} ingress, {len(policy.egress)} egress rules, {rules.entries} map entries"
    return [f"{file}: ok ({counts})"]


def _explained(examined: CheckResult, known: Mapping[str, Endpoint]) -> tuple[ActiveRule, ...] | None:
    from graft.commands.policy_show import rules_of

    policy, rules = examined.policy, examined.ruleset
    return None if policy is None or rules is None else rules_of(policy, rules, policy.resolve(known))


def _rule_lines(examined: CheckResult, rules: tuple[ActiveRule, ...] | None) -> list[str]:
    if rules is None or examined.ruleset is None:
        return []
    defaults = (examined.ruleset.bind_default.name.lower(), examined.ruleset.connect_default.name.lower())
    return [*(f"  {rule}" for rule in rules), "  else: bind {}, connect {}".format(*defaults)]


def _as_json(file: str, examined: CheckResult, explained: tuple[ActiveRule, ...] | None = None) -> str:
    policy, rules = examined.policy, examined.ruleset
    result: dict[str, object] = {"file": file, "ok": policy is not None}
    if policy is not None and rules is not None:
        ingress = len(policy.ingress) + len(policy.unix_ingress)
        counts = {"ingress": ingress, "egress": len(policy.egress), "entries": rules.entries}
        result |= {"policy": policy.name, **counts}
    if explained is not None:
        result["rules"] = [asdict(rule) for rule in explained]
    result["problems"] = [asdict(problem) for problem in examined.problems]
    return json.dumps(result, indent=2)


@app.command()
@command
def show(
    container: Annotated[
        str,
        typer.Argument(
            metavar="CONTAINER",
            help="A name or id from `graft ps`, or a cgroup.",
            autocompletion=completion.attached,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the policy in force for CONTAINER, read from the maps."""
    from graft.commands.find import find
    from graft.commands.policy_show import policy_in_force
    from graft.kernel.credentials import require_root
    from graft.model.settings import Settings
    from graft.state.installation import Installation

    require_root()
    graft = Installation.open(Settings.from_environment())
    found = find(graft, container)
    in_force = policy_in_force(graft, found)
    if as_json:
        head = {"container": found.name, "policy": found.policy, "transport": str(found.transport)}
        typer.echo(json.dumps(head | asdict(in_force), indent=2))
        return
    say(f"{found.name}: policy {found.policy}, {found.transport}")
    for rule in in_force.rules:
        say(f"  {rule}")
    say(f"  else: bind {in_force.bind_default}, connect {in_force.connect_default}")


@app.command()
@command
def apply(
    file: File,
    cgroup: Annotated[
        str | None,
        typer.Option(
            "--cgroup",
            metavar="CONTAINER",
            help="This container only. Default: all whose policy has the same name.",
            autocompletion=completion.containers,
        ),
    ] = None,
    no_save: NoSave = False,
) -> None:
    """Replace the policy of containers by FILE, in one step for each."""
    from graft.commands.policy_apply import apply as apply_policy
    from graft.commands.policy_apply import check_served
    from graft.commands.policy_source import policy_of
    from graft.kernel.credentials import require_root
    from graft.model.settings import Settings
    from graft.state.installation import Installation

    require_root()
    graft = Installation.open(Settings.from_environment())
    policy = policy_of(graft.settings, "", file, (), ())
    done = apply_policy(graft, policy, cgroup, save=not no_save)
    for changed in done.containers:
        say(f"{changed.name}: policy {changed.policy}")
    for saved in done.waiting:
        say(f"{saved.target.text}: policy {policy.name}, when it is there")
    for saved in done.detached:
        say(f"{saved.target.text}: policy {policy.name}, after the next boot: it is detached for now")
    for saved in done.for_now:
        say(f"{saved.target.text}: policy {policy.name}, after the next boot: for now it has another")
    warn(*done.cut_off)
    check_served(done.unserved)


@app.command()
@command
def schema() -> None:
    """Print the JSON schema of a policy file, with which an editor completes and checks one."""
    from graft.policy.schema import policy_schema

    typer.echo(json.dumps(policy_schema(), indent=2))


@app.command()
@command
def learn(
    container: Annotated[
        str,
        typer.Argument(
            metavar="CONTAINER", help="A name or id from `graft ps`, or a cgroup.", autocompletion=completion.attached
        ),
    ],
    seconds: Annotated[float, typer.Option(min=0.1, help="For how long it is watched; Ctrl-C ends it earlier.")] = 60.0,
) -> None:
    """Watch CONTAINER, and print the smallest policy that would have allowed what it did, or tried to do."""
    from graft.commands.find import find
    from graft.commands.policy_learn import Learning
    from graft.kernel.credentials import require_root
    from graft.model.settings import Settings
    from graft.policy.writer import policy_text
    from graft.state.installation import Installation

    require_root()
    graft = Installation.open(Settings.from_environment())
    found = find(graft, container)
    learning = Learning(graft, found)
    warn(f"graft: watching {found.name} for {seconds:g} s (Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt), progress(seconds) as step:
        learning.watch(seconds, step)
    if learning.lost or learning.has_gaps:
        warn("graft: some decisions were lost: what they were about is missing")
    say(*policy_text(learning.policy, learning.comment).splitlines())
