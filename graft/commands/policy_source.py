"""From what an operator types to what Graft works with: policies from files or flags, namespaces from words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from graft.errors import UsageError
from graft.kernel import netns
from graft.model.settings import Settings
from graft.policy.model import Policy, policy_from_flags
from graft.state.installation import known_endpoints


def policy_name(text: str) -> str:
    """A name that a policy may have, after a program's."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip("_.-")[:63] or "program"


def policy_of(
    settings: Settings, program: str, file: Path | None, ingress: Sequence[str], egress: Sequence[str]
) -> Policy:
    """The policy of a file, or of `-i` and `-e`. Raises UsageError, NotFoundError."""
    if file is None:
        return policy_from_flags(policy_name(program), ingress, egress)
    from graft.policy.files import read_policy
    from graft.policy.reader import load_policy  # import time: yaml

    if ingress or egress:
        raise UsageError("--policy: -i and -e are for use without it", "put the rules into the policy")
    return load_policy(read_policy(file), str(file), known_endpoints(settings))


def network(text: str) -> Path | None:
    """``new`` (None), or the namespace of that name, process or path. Raises NotFoundError."""
    return None if text == "new" else netns.resolve(text)
