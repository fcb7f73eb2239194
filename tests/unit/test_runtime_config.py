"""The OCI wrapper's edits of a container's configuration: no rule is weakened, nothing else is changed."""

from __future__ import annotations

import copy
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import ConflictError, GraftError, NotFoundError, RefusedError, UsageError
from graft.model.endpoint import Endpoint, parse_endpoint
from graft.model.settings import Settings
from graft.oci import arguments, bundle, options, request, seccomp_profile, state
from graft.oci.bundle import HOOK, Edit, edit_config, read_config, write_config
from graft.oci.options import RuntimeOptions
from graft.oci.request import Request, Source, requested
from graft.policy.compiler import compile_policy
from graft.policy.limits import MAX_BYTES, MAX_RULES
from graft.policy.model import PolicyError

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
CALLS = ["read", "write", "socket", "socketcall", "mount", *seccomp_profile.TRAPPED]

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
        return bool((values[condition["index"]] == condition["value"]) == (condition["op"] == "SCMP_CMP_EQ"))

    return call in rule["names"] and all(holds(condition) for condition in rule.get("args", []))


def outcomes(profile: dict[str, Any], call: str, values: tuple[int, ...]) -> set[tuple[str, int | None]]:
    """The actions of all rules that match this call, or the default: no order of rules is assumed."""
    found = {(rule["action"], rule.get("errnoRet")) for rule in profile["syscalls"] if matches(rule, call, values)}
    default = profile["defaultAction"]
    # Rules with the default's own action are left out by libseccomp's users.
    return {one for one in found if one[0] != default} or {(default, profile.get("defaultErrnoRet"))}


def notified(profile: dict[str, Any]) -> dict[str, Any]:
    return seccomp_profile.with_notifications(profile, LISTENER, "abc", "/run/graft/oci")


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
        return
    assert profile == before
    was, now = outcomes(profile, call, values), outcomes(edited, call, values)
    if call not in seccomp_profile.TRAPPED:
        assert now == was
        return
    assert {one for one in now if one[0] != NOTIFY} == {one for one in was if one[0] not in PASSING}
    assert any(one[0] == NOTIFY for one in now) == any(one[0] in PASSING for one in was)


@given(profiles)
def test_rules_for_other_calls_keep_their_actions_and_order(profile: dict[str, Any]) -> None:
    try:
        edited = notified(profile)
    except ConflictError:
        return

    def others(rules: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
        return [
            (name, rule["action"], json.dumps([rule.get("args"), rule.get("errnoRet")]))
            for rule in rules
            for name in rule["names"]
            if name not in seccomp_profile.TRAPPED
        ]

    assert others(edited["syscalls"]) == others(profile["syscalls"])
    kept = {key: value for key, value in edited.items() if key not in ("syscalls", "listenerPath", "listenerMetadata")}
    assert kept == {key: value for key, value in profile.items() if key != "syscalls"}


@given(profiles)
def test_a_second_edit_of_a_profile_changes_nothing(profile: dict[str, Any]) -> None:
    try:
        once = notified(profile)
    except ConflictError:
        return
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
    assert {name for rule in edited["syscalls"] for name in rule["names"]} == set(seccomp_profile.TRAPPED)


CONFIG: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": {"args": ["nginx"], "env": ["PATH=/bin"], "capabilities": {"bounding": ["CAP_CHOWN"]}},
    "linux": {"namespaces": [{"type": "network"}], "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}},
    "hooks": {"prestart": [{"path": "/usr/bin/theirs"}], "createRuntime": [{"path": "/bin/x", "args": ["x"]}]},
}
EDIT = Edit(
    create_runtime=("/usr/bin/python3", "-m", HOOK, "attach", "/s"), listener=LISTENER, own_listeners="/run/graft/oci"
)


def test_an_edit_adds_its_hook_after_others_and_changes_nothing_else() -> None:
    before = copy.deepcopy(CONFIG)
    edited = edit_config(CONFIG, EDIT)
    assert before == CONFIG
    assert edited["hooks"]["prestart"] == CONFIG["hooks"]["prestart"]
    assert [hook["path"] for hook in edited["hooks"]["createRuntime"]] == ["/bin/x", "/usr/bin/python3"]
    assert "poststop" not in edited["hooks"]
    for part in ("hooks", "linux"):
        edited.pop(part)
    assert edited == {key: value for key, value in CONFIG.items() if key not in ("hooks", "linux")}


def test_a_bundle_that_is_started_again_has_one_hook_and_the_new_listener() -> None:
    again = Edit(create_runtime=("/usr/bin/python3", "-m", HOOK, "attach", "/t"), listener="/run/graft/oci/def/seccomp")
    again = Edit(**{name: getattr(again, name) for name in again.__slots__} | {"own_listeners": "/run/graft/oci"})
    edited = edit_config(edit_config(CONFIG, EDIT), again)
    assert [hook["args"][-1] for hook in edited["hooks"]["createRuntime"]] == ["x", "/t"]
    assert edited["linux"]["seccomp"]["listenerPath"] == "/run/graft/oci/def/seccomp"


def test_without_a_listener_the_seccomp_profile_is_not_touched() -> None:
    edited = edit_config(
        CONFIG, Edit(create_runtime=EDIT.create_runtime, poststop=("/usr/bin/python3", "-m", HOOK, "reap"))
    )
    assert edited["linux"] == CONFIG["linux"]
    assert [hook["args"][-1] for hook in edited["hooks"]["poststop"]] == ["reap"]


@pytest.mark.parametrize("annotation", ["run.oci.seccomp.receiver", "run.oci.seccomp_bpf_data"])
def test_a_filter_that_comes_from_elsewhere_is_refused(annotation: str) -> None:
    with pytest.raises(ConflictError, match=annotation):
        edit_config({**CONFIG, "annotations": {annotation: "x"}}, EDIT)


def test_a_configuration_is_replaced_in_one_step_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    path.chmod(0o640)
    write_config(str(path), {"a": 1})
    assert read_config(str(path)) == {"a": 1}
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_symbolic_link_is_not_followed_when_a_configuration_is_written(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / "config.json").symlink_to("elsewhere")
    with pytest.raises(UsageError):
        write_config(str(tmp_path / "config.json"), {"a": 1})
    assert (tmp_path / "elsewhere").read_text() == "{}"


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 10_000, '{"a": ' + "[" * 100 + "]" * 100 + "}"])
def test_an_invalid_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json: "):
        read_config(str(tmp_path / "config.json"))


def test_a_missing_configuration_is_left_to_the_runtime(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for missing in (tmp_path / "missing", tmp_path / "pipe" / "below", tmp_path, tmp_path / "pipe"):
        assert read_config(str(missing)) is None


def test_a_configuration_that_is_very_big_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_MAX_BYTES", 100)
    (tmp_path / "config.json").write_text("{}" + " " * 98)
    assert read_config(str(tmp_path / "config.json")) == {}
    (tmp_path / "config.json").write_text("{}" + " " * 99)
    with pytest.raises(UsageError, match="too big"):
        read_config(str(tmp_path / "config.json"))


def test_a_request_beside_bytes_that_are_not_utf8_is_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"annotations": {"graft.policy": "web", "other": "\xff"}}')
    found = read_config(str(tmp_path / "config.json"))
    assert found is not None and requested(found) == Request(Source.ANNOTATION, "web")


@pytest.mark.parametrize("name", ["CAP_NET_ADMIN", "NET_ADMIN", "cap_net_admin", "Cap_Net_Admin"])
def test_a_capability_is_found_however_it_is_written(name: str) -> None:
    config = {"process": {"capabilities": {"bounding": ["CAP_CHOWN", name]}}}
    assert bundle.capability_sets(config, "CAP_NET_ADMIN") == ["bounding"]


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
    pairs = [f"127.0.{number // 256}.{number % 256}:1-65534=open" for number in range(600)]
    policy = request.policy_from_pairs(" ".join(pairs), KNOWN)
    with pytest.raises(UsageError, match="more than 32768 map entries"):
        compile_policy(policy, KNOWN)


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
        assert request.choose_policy(settings, Request(source, name), config, chosen, KNOWN).name == name
        return
    with pytest.raises(RefusedError, match="is not open"):
        request.choose_policy(settings, Request(source, name), config, chosen, KNOWN)


@pytest.mark.parametrize("name", ["../mine", "a/b", ".", "", "x" * 64])
def test_a_policys_name_cannot_leave_its_folder(settings: Settings, name: str) -> None:
    with pytest.raises(UsageError):
        request.find_policy(settings, Source.POLICY, name)


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


@pytest.mark.parametrize(
    ("line", "command", "config", "name", "log"),
    [
        ("--version", "", "config.json", "", None),
        (
            "--root /r --log /l --log-format json create --bundle /b --pid-file /p x",
            "create",
            "/b/config.json",
            "x",
            "/l",
        ),
        ("--log=/l --debug --systemd-cgroup run -b /b x", "run", "/b/config.json", "x", "/l"),
        ("--cgroup-manager=cgroupfs create --config c.json -b/b x", "create", "/b/c.json", "x", None),
        ("create x --bundle /b", "create", "/b/config.json", "x", None),
        ("create --no-pivot x", "create", "./config.json", "x", None),
        ("--root /r exec --bundle /b x sh", "exec", "config.json", "", None),
        ("--log /l kill x 9", "kill", "config.json", "", "/l"),
    ],
)
def test_an_engines_command_line_is_parsed(line: str, command: str, config: str, name: str, log: str | None) -> None:
    found = arguments.parse(line.split())
    assert (found.command, found.config, found.id, found.log) == (command, config, name, log)


@given(
    st.lists(
        st.sampled_from(["create", "run", "-b", "--bundle", "--log", "--", "-", "", "=", "x", "--a=b"]), max_size=8
    )
)
def test_any_command_line_is_parsed_without_an_error(words: list[str]) -> None:
    arguments.parse(words)


def test_options_of_the_operator_are_read_line_by_line() -> None:
    text = "---\n# which one\nruntime: crun # the small one\ntrust-annotations: false\nallow-net-admin: true\n"
    assert options.parse(text, "f") == RuntimeOptions("crun", False, True)


@pytest.mark.parametrize("text", ["runtmie: crun", "allow-net-admin: yes", "crun"])
def test_the_error_for_an_invalid_option_names_its_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^f:2: "):
        options.parse(f"\n{text}\n", "f")


@given(st.binary(max_size=80))
def test_a_message_that_is_no_state_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        state.parse(raw)


def test_the_state_of_a_hook_and_that_of_a_listener_are_parsed() -> None:
    plain = {"ociVersion": "1.0", "id": "c", "pid": 7, "bundle": "/b", "annotations": {"a": "b"}}
    assert state.parse(json.dumps(plain).encode()) == state.State("c", 7, "/b", {"a": "b"})
    wrapped = {"fds": ["other", "seccompFd"], "pid": 9, "metadata": "m", "state": plain}
    found = state.parse(json.dumps(wrapped).encode())
    assert (found.id, found.pid, found.descriptors) == ("c", 9, ("other", "seccompFd"))


class Sender:
    """A runtime's end of a connection, and the message at the other end."""

    def __init__(self) -> None:
        self.end, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.message = state.Message(other)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()
        self.message.close()


def test_a_message_in_several_parts_is_parsed_when_it_is_complete() -> None:
    with Sender() as sender:
        for part in (b'{"id": "c", "annotations": {"a": "}"', b'}, "pid"', b": 7"):
            sender.end.send(part)
            assert sender.message.read() is None and not sender.message.ended
        sender.end.send(b"}")
        assert sender.message.read() == state.State("c", 7, "", {"a": "}"})


def test_a_message_that_is_never_complete_is_ended() -> None:
    with Sender() as sender:
        pieces = 0
        while not sender.message.ended:
            sender.end.send(b"{}" if pieces else b"[")
            assert sender.message.read() is None
            pieces += 1
        assert pieces == 256


def test_a_message_that_is_too_big_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_MAX_BYTES", 1000)
    with Sender() as sender:
        sender.end.send(b'{"id": "' + b"x" * 1000)
        assert sender.message.read() is None and sender.message.ended
