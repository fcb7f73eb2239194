"""A plan as the message to a shim's process has it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from graft.errors import UsageError
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.oci.container_job import plan_of, plan_value
from graft.oci.plan import Plan
from graft.policy.model import Origin, Policy, policy_from_flags
from tests.support.saved import EVERY_RULE

SETTINGS = Settings.from_environment({"GRAFT_RUN_DIR": "/run/other", "GRAFT_CGROUP": "other"})


@pytest.mark.parametrize("policy", [EVERY_RULE, Policy("none"), policy_from_flags("x", ["0.0.0.0:80=web"], [], True)])
@pytest.mark.parametrize("origin", Origin)
def test_a_plan_comes_back_from_its_values(policy: Policy, origin: Origin) -> None:
    one = replace(policy, origin=origin)
    for plan in (
        Plan(SETTINGS, one, Transport.SWAP, "a" * 64, Path("/run/other/oci/x"), Path("/sys/fs/cgroup"), True, False),
        Plan(SETTINGS, one, Transport.DIRECT, "", None, Path("/"), False, True),
    ):
        assert plan_of(json.loads(json.dumps(plan_value(plan)))) == plan


def test_a_policy_that_is_none_is_refused() -> None:
    value = plan_value(Plan(SETTINGS, Policy("none"), Transport.SWAP, "", None, Path("/")))
    with pytest.raises(UsageError):
        plan_of(value | {"policy": {"name": "../x", "more": 1}})
