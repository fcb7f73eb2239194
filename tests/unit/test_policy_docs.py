"""docs/policy.md holds what it says: each policy in it is good, or gets the very errors that stand below it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graft.policy import limits
from graft.policy.reader import check_policy

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
POLICIES = re.findall(r"^```yaml\n(.*?)^```\n(?:```text\n(.*?)^```)?", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("text", "errors"), POLICIES)
def test_a_policy_of_the_page_gets_the_errors_below_it_or_none(text: str, errors: str) -> None:
    assert [problem.format("policy.yaml") for problem in check_policy(text, {}).problems] == errors.splitlines()


def test_the_page_has_the_limits_that_hold() -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| more than")]
    assert f"{limits.MAX_BYTES >> 20} MiB of text" in row
    assert f"{limits.MAX_RULES} rules of a kind, {limits.MAX_ENTRIES} map entries" in row
    assert f"{limits.MAX_VALUES} values, or more than {limits.MAX_DEPTH} inside of each other" in row


def test_the_page_has_policies_that_are_good_and_others_that_are_not() -> None:
    assert {bool(errors) for _, errors in POLICIES} == {True, False}
