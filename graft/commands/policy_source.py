"""Options of several commands as values: a policy from --policy, -i and -e, which may change before it is in force; a
namespace from --net.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from graft.errors import ConflictError, UsageError
from graft.kernel import netns
from graft.model.endpoint import Endpoint
from graft.model.settings import Settings
from graft.policy.model import Policy, policy_from_flags
from graft.policy.policy_file import PolicyFile
from graft.state.changed_policy import is_unchanged
from graft.state.installation import Installation, known_endpoints

T = TypeVar("T")

_TRIES = 5


def policy_name(text: str) -> str:
    """A valid policy name, made from the name of a program."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip("_.-")[:63] or "program"


def policy_of(
    settings: Settings,
    program: str,
    file: Path | None,
    ingress: Sequence[str],
    egress: Sequence[str],
    deny: bool = False,
) -> Policy:
    """The policy in ``file``, or that of `-i`, `-e` and `--deny`. Raises UsageError, NotFoundError."""
    if file is None:
        return policy_from_flags(policy_name(program), ingress, egress, deny)
    if ingress or egress or deny:
        raise UsageError("--policy: cannot be combined with -i, -e and --deny", "put the rules into the policy file")
    return read_again(PolicyFile.of(file), known_endpoints(settings))


def read_again(file: PolicyFile, known: Mapping[str, Endpoint]) -> Policy:
    """The policy in a file, as it is now. Raises UsageError, NotFoundError, PolicyError."""
    from graft.policy.files import read_policy
    from graft.policy.reader import load_policy  # import time: yaml

    now = PolicyFile.of(file.path, file.passed)
    return replace(load_policy(read_policy(file.path), str(file.path), known), file=now if now.stamp else None)


def with_current(graft: Installation, policy: Policy, put_in_force: Callable[[Policy], T]) -> T:
    """What ``put_in_force`` gives; it is called again as long as the policy's file is another one by then: the operator
    has narrowed it meanwhile, or so. Raises what the call raises.

    Raises ConflictError where the file changes all the time, and another GraftError where it cannot be looked at, or
    read, again. What was put in force then stays: whoever asked for it learns that it may not be the newest.
    """
    for _ in range(_TRIES):
        done = put_in_force(policy)
        if policy.file is None or is_unchanged(policy):
            return done
        policy = read_again(policy.file, graft.endpoints.by_name())
    raise ConflictError(f"policy: {policy.name} changes all the time", "try again, when it stays as it is")


def network(text: str) -> Path | None:
    """None for ``new``, or a path of the namespace that ``text`` names (name, pid or path). Raises NotFoundError."""
    return None if text == "new" else netns.resolve(text)
