"""What a soak calls a failure (tests/soak/excuses.py), and what its accounts allow."""

from __future__ import annotations

from tests.soak.accounts import Account
from tests.soak.excuses import Excuse, Failure, judge, parse_worker


def test_a_failure_is_excused_while_its_own_container_is_away() -> None:
    excuses = [Excuse("a", 10.0, 12.0, "restarted")]
    touching = [Failure("a", 9.0, 10.0, ""), Failure("a", 12.0, 13.0, ""), Failure("a", 9.0, 13.0, "")]
    others = [Failure("a", 8.0, 9.9, ""), Failure("a", 12.1, 13.0, ""), Failure("b", 11.0, 11.5, "")]
    verdict = judge([*touching, *others], excuses, 0)
    assert (verdict.unexcused, verdict.rare, verdict.excused) == (tuple(others), (), 3)


def test_few_are_excused_by_a_rare_excuse() -> None:
    excuses = [Excuse("a", 10.0, 12.0, "killed", rare=True), Excuse("a", 11.0, 12.0, "restarted")]
    rare = [Failure("a", 10.0, 10.5, ""), Failure("a", 10.2, 10.6, "")]
    sure = Failure("a", 11.0, 11.5, "")
    assert judge([*rare, sure], excuses, 2).rare == tuple(rare)
    verdict = judge([*rare, sure], excuses, 1)
    assert (verdict.unexcused, verdict.rare, verdict.excused) == (tuple(rare), (), 1)


def test_what_a_worker_says_is_counted() -> None:
    said = "failed 1.5 2.5 connect: Connection refused\ncount 10 4\nforbidden 10.0.0.1:1 was reached\ncount 20 8\n"
    made, tried, failures, succeeded = parse_worker("a", said)
    assert (made, tried) == (20, 8)
    assert failures == [Failure("a", 1.5, 2.5, "out of the container: connect: Connection refused")]
    assert succeeded == ["a: forbidden 10.0.0.1:1 was reached"]


def test_more_than_before_is_named() -> None:
    before = Account(100, 50, 10, 5, 5, 100_000)
    assert Account(150, 60, 10, 5, 5, 119_000).excess(before) == []
    assert Account(90, 50, 11, 5, 5, 130_001).excess(before) == [
        "1 processes more than before",
        "30001 memory more than before",
    ]
