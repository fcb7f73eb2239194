"""What a container asks of Graft: a policy or pairs, by annotation or environment; and what it may not have."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graft.errors import ConflictError, GraftError, NotFoundError, RefusedError, UsageError
from graft.model.endpoint import Endpoint, parse_endpoint
from graft.model.settings import Settings
from graft.oci import request
from graft.oci.options import RuntimeOptions
from graft.oci.request import Request, Source, requested
from graft.policy.compiler import compile_policy
from graft.policy.limits import MAX_BYTES, MAX_PAIRS_ENTRIES, MAX_RULES
from graft.policy.model import Origin, PolicyError


def asking(*variables: str, **annotations: str) -> dict[str, Any]:
    notes = {name.replace("_", ".", 1).replace("_", "-"): value for name, value in annotations.items()}
    return {"process": {"env": list(variables)}, "annotations": notes}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        (asking("PATH=/bin"), None),
        (asking("GRAFT_POLICY="), None),
        (asking("GRAFT_POLICY=web"), Request(Source.POLICY, "web")),
        (asking("GRAFT_CONV_PAIRS=0.0.0.0:80=a"), Request(Source.PAIRS, "0.0.0.0:80=a")),
        (asking("GRAFT_POLICY=web", graft_policy="other"), Request(Source.ANNOTATION, "other")),
    ],
)
def test_the_request_of_a_container(config: dict[str, Any], expected: Request | None) -> None:
    assert requested(config) == expected


def test_two_requests_at_once_are_refused() -> None:
    with pytest.raises(ConflictError):
        requested(asking("GRAFT_POLICY=web", "GRAFT_CONV_PAIRS=0.0.0.0:80=a"))


KNOWN: dict[str, Endpoint] = {
    "open": parse_endpoint("open", "0.0.0.0:8080", open_=True),
    "shut": parse_endpoint("shut", "0.0.0.0:8081"),
}


@pytest.mark.parametrize("between", [" ", ",", ", ", "\n"])
def test_several_pairs_make_several_rules(between: str) -> None:
    policy = request.policy_from_pairs(between.join(["0.0.0.0:80=open", "[::]:80-90=open"]), KNOWN)
    assert [(str(rule.bind), rule.endpoint) for rule in policy.ingress] == [
        ("0.0.0.0:80", "open"),
        ("[::]:80-90", "open"),
    ]


@pytest.mark.parametrize(
    ("pairs", "error"),
    [("0.0.0.0:80=shut", RefusedError), ("0.0.0.0:80=none", NotFoundError), ("0.0.0.0:x=open", UsageError)],
)
def test_the_error_for_an_invalid_pair_names_the_variable(pairs: str, error: type[GraftError]) -> None:
    with pytest.raises(error, match=r"^GRAFT_CONV_PAIRS: "):
        request.policy_from_pairs(pairs, KNOWN)


def test_pairs_may_name_port_0_and_a_range_of_as_many_ports_as_the_endpoint_has() -> None:
    known = {
        "dyn": parse_endpoint("dyn", "0.0.0.0:dynamic", open_=True),
        "rtp": parse_endpoint("rtp", "0.0.0.0:20000-20009", open_=True),
    }
    policy = request.policy_from_pairs("*:0=dyn *:5000-5009=rtp", known)
    assert [str(rule.bind) for rule in policy.ingress] == ["*:0", "*:5000-5009"]
    assert {entry.first_port for entry in compile_policy(policy, known).ingress} == {0, 5000}
    with pytest.raises(PolicyError) as refused:
        compile_policy(request.policy_from_pairs("*:5000-5008=rtp", known), known)
    assert refused.value.lines() == [
        "graft: GRAFT_CONV_PAIRS *:5000-5008=rtp: *:5000-5008 has 9 ports, the endpoint rtp (0.0.0.0:20000-20009) 10"
        " (as many, such as 5000-5009; or an endpoint of one port)"
    ]


def test_as_many_pairs_as_a_policy_file_may_have_rules_are_accepted() -> None:
    policy = request.policy_from_pairs(" ".join(["0.0.0.0:80=open"] * MAX_RULES), KNOWN)
    assert len(policy.ingress) == MAX_RULES
    assert compile_policy(policy, KNOWN).entries == 4  # for TCP and UDP, for 0.0.0.0 and [::]


def test_more_pairs_than_that_are_refused_before_any_is_parsed() -> None:
    with pytest.raises(UsageError, match=f"^GRAFT_CONV_PAIRS: more than {MAX_RULES} of them") as refused:
        request.policy_from_pairs(" ".join(["nonsense"] * (MAX_RULES + 1)), KNOWN)
    assert refused.value.hint


def test_pairs_longer_than_a_policy_file_are_refused_before_they_are_split() -> None:
    with pytest.raises(UsageError, match=f"^GRAFT_CONV_PAIRS: the text has {MAX_BYTES + 1} bytes"):
        request.policy_from_pairs(" " * (MAX_BYTES + 1), KNOWN)


def test_pairs_that_would_take_very_many_map_entries_are_refused() -> None:
    pairs = [f"127.0.0.{number}:1-65534=open" for number in range(1, 10)]
    assert compile_policy(request.policy_from_pairs(" ".join(pairs[:8]), KNOWN), KNOWN).entries == 480
    policy = request.policy_from_pairs(" ".join(pairs), KNOWN)
    with pytest.raises(UsageError, match=f"more than {MAX_PAIRS_ENTRIES} map entries"):
        compile_policy(policy, KNOWN)
    assert compile_policy(replace(policy, origin=Origin.OPERATOR), KNOWN).entries == 540  # as a policy file has them


def test_the_error_for_conflicting_pairs_names_both() -> None:
    known = {**KNOWN, "other": parse_endpoint("other", "0.0.0.0:8082", open_=True)}
    policy = request.policy_from_pairs("0.0.0.0:80-90=open 0.0.0.0:85-95=other", known)
    with pytest.raises(PolicyError) as refused:
        compile_policy(policy, known)
    (line,) = refused.value.lines()
    assert line.startswith("graft: GRAFT_CONV_PAIRS 0.0.0.0:85-95=other: ")
    assert "GRAFT_CONV_PAIRS 0.0.0.0:80-90=open redirects 0.0.0.0:80-90 to open" in line


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_policys_path_is_opened_only_if_it_is_a_regular_file(settings: Settings, kind: str) -> None:
    path = settings.state_dir / kind
    if kind == "pipe":
        os.mkfifo(path)  # a reader that opens it waits for a writer
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UsageError, match="is not a regular file"):
        request.choose_policy(settings, Request(Source.ANNOTATION, str(path)), {}, RuntimeOptions(), KNOWN)


@pytest.mark.parametrize("value", ["/etc/\0", "/\ud800"])
def test_an_invalid_path_is_refused(settings: Settings, value: str) -> None:
    with pytest.raises(UsageError, match="is not a path"):
        request.choose_policy(settings, Request(Source.ANNOTATION, value), {}, RuntimeOptions(), KNOWN)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "policies").mkdir()
    rules = "ingress: [{bind: '0.0.0.0:80', endpoint: shut}]\n"
    (tmp_path / "policies/mine.yaml").write_text(f"name: mine\n{rules}")
    (tmp_path / "policies/ours.yaml").write_text(f"name: ours\nopen: true\n{rules}")
    return Settings.from_environment({"GRAFT_STATE_DIR": str(tmp_path)})


PODMAN = {"io.container.manager": "libpod"}


@pytest.mark.parametrize(
    ("source", "name", "notes", "chosen", "allowed"),
    [
        (Source.ANNOTATION, "mine", {}, RuntimeOptions(), True),
        (Source.ANNOTATION, "mine", PODMAN, RuntimeOptions(), False),
        (Source.ANNOTATION, "mine", PODMAN, RuntimeOptions(trust_annotations=True), True),
        (Source.ANNOTATION, "mine", {}, RuntimeOptions(trust_annotations=False), False),
        (Source.ANNOTATION, "ours", PODMAN, RuntimeOptions(), True),
        (Source.POLICY, "mine", {}, RuntimeOptions(trust_annotations=True), False),
        (Source.POLICY, "ours", {}, RuntimeOptions(), True),
    ],
)
def test_a_request_that_an_image_could_make_reaches_open_policies_only(
    settings: Settings, source: Source, name: str, notes: dict[str, str], chosen: RuntimeOptions, allowed: bool
) -> None:
    config = {"annotations": notes}
    if allowed:
        policy = request.choose_policy(settings, Request(source, name), config, chosen, KNOWN)
        is_operators = source is Source.ANNOTATION and request.annotations_are_trusted(config, chosen)
        assert (policy.name, policy.origin) == (name, Origin.OPERATOR if is_operators else Origin.ASKED)
        return
    with pytest.raises(RefusedError, match="is not open"):
        request.choose_policy(settings, Request(source, name), config, chosen, KNOWN)


@pytest.mark.parametrize("name", ["../mine", "a/b", ".", "", "x" * 64])
def test_a_policys_name_cannot_leave_its_folder(settings: Settings, name: str) -> None:
    with pytest.raises(UsageError):
        request.find_policy(settings, Source.POLICY, name, trusted=False)


def with_net_admin(*sets: str, namespaces: list[dict[str, str]] | None = None, **notes: str) -> dict[str, Any]:
    config = asking(**notes)
    config["process"]["capabilities"] = {name: ["CAP_NET_ADMIN"] for name in sets}
    config["linux"] = {"namespaces": namespaces or []}
    return config


@pytest.mark.parametrize("name", ["bounding", "effective", "permitted", "inheritable", "ambient"])
def test_net_admin_in_any_set_is_refused(name: str) -> None:
    with pytest.raises(RefusedError, match=f"CAP_NET_ADMIN \\({name}\\)"):
        request.check_capabilities(with_net_admin(name), RuntimeOptions(), own_user_namespace=False)


def test_net_admin_is_allowed_by_the_operator_or_in_a_user_namespace() -> None:
    request.check_capabilities(
        with_net_admin("bounding"), RuntimeOptions(allow_net_admin=True), own_user_namespace=False
    )
    request.check_capabilities(with_net_admin("bounding"), RuntimeOptions(), own_user_namespace=True)
    request.check_capabilities(
        with_net_admin("bounding", graft_allow_net_admin="true"), RuntimeOptions(), own_user_namespace=False
    )
    request.check_capabilities(with_net_admin(), RuntimeOptions(), own_user_namespace=False)


def test_an_annotation_in_podman_does_not_allow_net_admin() -> None:
    config = with_net_admin("bounding", graft_allow_net_admin="true")
    config["annotations"] |= PODMAN
    with pytest.raises(RefusedError):
        request.check_capabilities(config, RuntimeOptions(), own_user_namespace=False)
