"""docs/policy.md is right: each policy in it is valid, or gets exactly the errors below it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graft.policy import limits
from graft.policy.reader import check_policy

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
POLICIES = re.findall(r"^```yaml\n(.*?)^```\n(?:```text\n(.*?)^```)?", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("text", "errors"), POLICIES)
def test_a_policy_in_the_page_gets_exactly_the_errors_below_it(text: str, errors: str) -> None:
    assert [problem.format("policy.yaml") for problem in check_policy(text, {}).problems] == errors.splitlines()


def test_the_page_has_the_actual_limits() -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| more than")]
    assert f"{limits.MAX_BYTES >> 20} MiB of text" in row
    assert f"{limits.MAX_RULES} rules of a kind, {limits.MAX_ENTRIES} map entries" in row
    assert f"need {limits.MAX_PAIRS_ENTRIES} map entries" in PAGE
    assert f"{limits.MAX_VALUES} values, or more than {limits.MAX_DEPTH} inside of each other" in row


def test_the_page_has_valid_and_invalid_policies() -> None:
    assert {bool(errors) for _, errors in POLICIES} == {True, False}
