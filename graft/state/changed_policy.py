"""Whether a policy's file is still the one whose rules are in force (graft/policy/policy_file.py says why)."""

from __future__ import annotations

from graft.errors import RefusedError
from graft.policy.model import Policy
from graft.state import members
from graft.state.installation import Installation
from graft.state.records import Container


def is_unchanged(policy: Policy) -> bool:
    """Whether it is, for a policy from a file. Raises KernelError where somebody holds a folder on the way."""
    file = policy.file
    return file is None or members.answer_about(f"the policy {file.path}", lambda: file.is_unchanged)


def refuse_changed(graft: Installation, container: Container, policy: Policy) -> None:
    """Raises RefusedError where it is another one now, and KernelError: what starts must not go on then, and is a
    container no more.
    """
    try:
        if not is_unchanged(policy):
            raise RefusedError(f"policy: {policy.name} has changed while the program started", "start it again")
    except BaseException:
        with graft.transaction() as change:
            change.containers.remove(container)
        raise
