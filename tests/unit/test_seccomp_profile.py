"""A container's seccomp profile with notifications: no rule is weakened, and no other rule is changed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from graft.errors import ConflictError
from graft.kernel.seccomp_filter import FAMILIES, TRAPPED
from graft.oci import seccomp_profile

LISTENER = "/run/graft/oci/abc/seccomp"
ACTIONS = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_LOG",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_KILL_PROCESS",
]
PASSING = {"SCMP_ACT_ALLOW", "SCMP_ACT_LOG"}
NOTIFY = "SCMP_ACT_NOTIFY"
CALLS = ["read", "write", "socket", "socketcall", "mount", *TRAPPED]

conditions = st.lists(
    st.fixed_dictionaries(
        {"index": st.integers(0, 2), "value": st.integers(0, 3), "op": st.sampled_from(["SCMP_CMP_EQ", "SCMP_CMP_NE"])}
    ),
    max_size=2,
)
rules = st.builds(
    lambda names, action, args, errno: {
        "names": names,
        "action": action,
        **({"args": args} if args else {}),
        **({"errnoRet": errno} if errno else {}),
    },
    st.lists(st.sampled_from(CALLS), min_size=1, max_size=5, unique=True),
    st.sampled_from(ACTIONS),
    conditions,
    st.sampled_from([None, 1, 38]),
)
profiles = st.builds(
    lambda default, syscalls, extra: {"defaultAction": default, "syscalls": syscalls, **extra},
    st.sampled_from(ACTIONS),
    st.lists(rules, max_size=6),
    st.sampled_from([{}, {"architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]}, {"defaultErrnoRet": 38}]),
)


def matches(rule: dict[str, Any], call: str, values: tuple[int, ...]) -> bool:
    def holds(condition: dict[str, Any]) -> bool:
        value = values[condition["index"]]
        if condition["op"] == "SCMP_CMP_MASKED_EQ":
            return bool(value & condition["value"] == condition["valueTwo"])
        if condition["op"] == "SCMP_CMP_GT":
            return bool(value > condition["value"])
        return bool((value == condition["value"]) == (condition["op"] == "SCMP_CMP_EQ"))

    return call in rule["names"] and all(holds(condition) for condition in rule.get("args", []))


def outcomes(profile: dict[str, Any], call: str, values: tuple[int, ...]) -> set[tuple[str, int | None]]:
    """The actions of all rules that match this call, or the default: no order of rules is assumed."""
    found = {(rule["action"], rule.get("errnoRet")) for rule in profile["syscalls"] if matches(rule, call, values)}
    default = profile["defaultAction"]
    # Rules with the default's own action are left out by libseccomp's users.
    return {one for one in found if one[0] != default} or {(default, profile.get("defaultErrnoRet"))}


def refused_and_notified(profile: dict[str, Any], call: str, values: tuple[int, ...]) -> set[tuple[str, int | None]]:
    """`outcomes` without those after which the call just runs."""
    return {one for one in outcomes(profile, call, values) if one[0] not in PASSING}


def notified(profile: dict[str, Any]) -> dict[str, Any]:
    """The profile with notifications. Raises ConflictError where it cannot have them."""
    return seccomp_profile.with_notifications(profile, LISTENER, "abc", "/run/graft/oci")


def born(profile: dict[str, Any]) -> dict[str, Any]:
    """The profile with notifications of socket. Raises ConflictError where it cannot have them."""
    return seccomp_profile.with_notifications(profile, LISTENER, "abc", "/run/graft/oci", born=True)


def notified_or_another_example(profile: dict[str, Any]) -> dict[str, Any]:
    """The profile with notifications. One that cannot have them does not count as an example."""
    try:
        return notified(profile)
    except ConflictError:
        reject()


@given(profiles, st.sampled_from(CALLS), st.tuples(*[st.integers(0, 4)] * 3))
def test_allowed_calls_are_notified_and_everything_else_is_unchanged(
    profile: dict[str, Any], call: str, values: tuple[int, int, int]
) -> None:
    before = copy.deepcopy(profile)
    try:
        edited = notified(profile)
    except ConflictError:
        default_passes = profile["defaultAction"] in PASSING
        assert default_passes and any(rule.get("args") for rule in profile["syscalls"])
        reject()  # so that enough other profiles are tried
    assert profile == before
    was, now = outcomes(profile, call, values), outcomes(edited, call, values)
    if call not in TRAPPED:
        assert now == was
        return
    assert {one for one in now if one[0] != NOTIFY} == {one for one in was if one[0] not in PASSING}
    assert any(one[0] == NOTIFY for one in now) == any(one[0] in PASSING for one in was)


def swap_with_datagrams(profile: dict[str, Any]) -> dict[str, Any]:
    """The profile of transport swap with notifications of datagram sockets too. Raises ConflictError."""
    return seccomp_profile.with_notifications(profile, LISTENER, "abc", "/run/graft/oci", datagrams=True)


@given(profiles, st.tuples(st.sampled_from([0, 1, 2, 3, 10, 11, 70]), st.sampled_from([1, 2, 3, 0x802]), st.just(0)))
def test_swap_notifies_datagram_sockets_of_the_two_families_and_changes_no_other(
    profile: dict[str, Any], values: tuple[int, int, int]
) -> None:
    try:
        edited = swap_with_datagrams(profile)
        born(profile)
    except ConflictError:
        reject()
    was, now = outcomes(profile, "socket", values), outcomes(edited, "socket", values)
    if values[0] not in FAMILIES:
        assert now == was
        return
    # (A rule with a condition about the type is notified as it is: the supervisor lets what is no datagram run.)
    typed = any(one["index"] == 1 for rule in profile["syscalls"] for one in rule.get("args", []))
    assert {one for one in now if one[0] != NOTIFY} - {
        (profile["defaultAction"], profile.get("defaultErrnoRet"))
    } <= was
    notifies = any(one[0] == NOTIFY for one in now)
    if values[1] & 15 == 2:
        assert notifies == any(one[0] in PASSING for one in was)
    elif not typed:
        assert not notifies
        assert now == was


@given(profiles, st.sampled_from(CALLS), st.tuples(st.sampled_from([0, 1, 2, 3, 10, 11, 70]), *[st.integers(0, 4)] * 2))
def test_born_notifies_sockets_of_the_two_families_and_changes_nothing_else(
    profile: dict[str, Any], call: str, values: tuple[int, int, int]
) -> None:
    before = copy.deepcopy(profile)
    try:
        edited = born(profile)
    except ConflictError:
        assert any(rule.get("args") and "socket" in rule["names"] for rule in profile["syscalls"])
        reject()
    assert profile == before
    was, now = outcomes(profile, call, values), outcomes(edited, call, values)
    if call != "socket" or values[0] not in FAMILIES:
        assert now == was
        return
    assert {one for one in now if one[0] != NOTIFY} == {one for one in was if one[0] not in PASSING}
    assert any(one[0] == NOTIFY for one in now) == any(one[0] in PASSING for one in was)


@given(profiles)
def test_a_profile_edited_for_one_transport_can_be_edited_for_the_other(profile: dict[str, Any]) -> None:
    try:
        once, other = born(profile), notified(profile)
    except ConflictError:
        reject()
    assert born(once) == once
    for call in CALLS:
        for family in (0, 1, 2, 3, 10, 11):
            values = (family, 1, 2)
            assert refused_and_notified(born(other), call, values) == refused_and_notified(once, call, values)
            assert refused_and_notified(notified(once), call, values) == refused_and_notified(other, call, values)


def test_a_profile_of_dockers_is_divided() -> None:
    """Docker's default profile allows every family but AF_VSOCK."""
    only = [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_ALLOW"}]}
    profile["syscalls"][0]["args"] = only  # type: ignore[index]
    actions = {
        family: outcomes(born(profile), "socket", (family, 1, 0)) for family in (0, 1, 2, 10, 16, 39, 40, 41, 99)
    }
    allowed, refused, told = {("SCMP_ACT_ALLOW", None)}, {("SCMP_ACT_ERRNO", None)}, {(NOTIFY, None)}
    assert actions == {
        0: allowed,
        1: allowed,
        2: told,
        10: told,
        16: allowed,
        39: allowed,
        40: refused,
        41: allowed,
        99: allowed,
    }


@given(profiles)
def test_rules_for_other_calls_keep_their_actions_and_order(profile: dict[str, Any]) -> None:
    edited = notified_or_another_example(profile)

    def others(rules: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
        return [
            (name, rule["action"], json.dumps([rule.get("args"), rule.get("errnoRet")]))
            for rule in rules
            for name in rule["names"]
            if name not in TRAPPED
        ]

    assert others(edited["syscalls"]) == others(profile["syscalls"])
    kept = {key: value for key, value in edited.items() if key not in ("syscalls", "listenerPath", "listenerMetadata")}
    assert kept == {key: value for key, value in profile.items() if key != "syscalls"}


@given(profiles)
def test_a_second_edit_of_a_profile_changes_nothing(profile: dict[str, Any]) -> None:
    once = notified_or_another_example(profile)
    assert notified(once) == once


def test_a_rule_for_some_arguments_is_notified_for_those_only() -> None:
    only = [{"index": 2, "value": 16, "op": "SCMP_CMP_EQ"}]
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["connect"], "action": "SCMP_ACT_ALLOW"}]}
    profile["syscalls"][0]["args"] = only  # type: ignore[index]
    assert notified(profile)["syscalls"] == [{"names": ["connect"], "action": NOTIFY, "args": only}]


def test_a_denied_call_stays_denied_where_the_default_allows() -> None:
    denied = {"names": ["bind", "mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    edited = notified({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denied]})
    assert edited["syscalls"][0] == denied
    assert [rule["names"] for rule in edited["syscalls"][1:]] == [["connect"], ["listen"]]


def test_a_call_that_is_denied_for_some_arguments_only_is_refused() -> None:
    rule = {"names": ["connect"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}
    with pytest.raises(ConflictError, match="connect is denied for some arguments"):
        notified({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})


@pytest.mark.parametrize(
    "profile",
    [
        {"defaultAction": "SCMP_ACT_ERRNO", "listenerPath": "/run/agent", "syscalls": []},
        {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mount"], "action": NOTIFY}]},
        {"defaultAction": NOTIFY},
    ],
)
def test_a_profile_with_another_listener_or_notifications_is_refused(profile: dict[str, Any]) -> None:
    with pytest.raises(ConflictError):
        notified(profile)


def test_a_container_without_a_profile_gets_one_that_allows_all_and_32_bit_too() -> None:
    edited = notified(seccomp_profile.allow_all_profile("x86_64"))
    assert edited["defaultAction"] == "SCMP_ACT_ALLOW"
    assert set(edited["architectures"]) == {"SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"}
    assert {name for rule in edited["syscalls"] for name in rule["names"]} == set(TRAPPED)
