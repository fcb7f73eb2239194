"""What an engine's configuration becomes with the runtime `graft`, and without it again: nothing else changes."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graft.errors import ConflictError, UsageError
from graft.oci.engine_config import (
    ByHandError,
    containerd_drop_in,
    docker_with,
    docker_without,
    podman_with,
    podman_without,
    without_containerd_runtime,
)

PROGRAM = "/usr/bin/graft-runtime"
KEYS = st.sampled_from(["runtimes", "graft", "debug", "log-opts", "default-runtime", 'a "quoted" one', "ü", "}"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
RUNTIMES = st.dictionaries(st.sampled_from(["runc", "kata", "ü"]), VALUES, min_size=1, max_size=2)
INDENTS = st.sampled_from([None, 1, 2, 4, "\t"])


@st.composite
def json_texts(draw: st.DrawFn) -> str:
    """A daemon.json in some layout, without the runtime, and without an empty `runtimes`."""
    value = draw(
        st.dictionaries(KEYS.filter(lambda key: key not in ("runtimes", "default-runtime")), VALUES, max_size=4)
    )
    if draw(st.booleans()):
        value["runtimes"] = draw(RUNTIMES)
    if draw(st.booleans()):
        value = dict(reversed(value.items()))
    text = json.dumps(value, indent=draw(INDENTS), ensure_ascii=draw(st.booleans()))
    if draw(st.booleans()):
        text = text.replace("\n", "\r\n")
    return draw(st.sampled_from(["", "\n", "  "])) + text + draw(st.sampled_from(["", "\n", "\n\n"]))


def value_of(text: str | None) -> dict[str, Any]:
    assert text is not None
    value: dict[str, Any] = json.loads(text)
    return value


@given(json_texts())
def test_docker_gets_one_runtime_more_and_nothing_else(text: str) -> None:
    wanted = value_of(text)
    wanted.setdefault("runtimes", {})["graft"] = {"path": PROGRAM}
    written = docker_with(text, PROGRAM, "f")
    assert value_of(written) == wanted
    assert docker_with(written, PROGRAM, "f") == written


@given(json_texts())
def test_install_then_uninstall_gives_dockers_file_back_byte_by_byte(text: str) -> None:
    assert docker_without(docker_with(text, PROGRAM, "f"), "f") == text


@given(json_texts())
def test_uninstall_leaves_a_file_of_dockers_alone_that_has_no_such_runtime(text: str) -> None:
    assert docker_without(text, "f") == text


def test_a_file_that_install_made_for_docker_goes_again() -> None:
    made = docker_with(None, PROGRAM, "f")
    entry = '        "graft": {\n            "path": "/usr/bin/graft-runtime"\n        }\n'
    assert made == f'{{\n    "runtimes": {{\n{entry}    }}\n}}\n'
    assert docker_without(made, "f") is None
    assert docker_without(None, "f") is None


def test_an_entry_is_written_as_its_neighbours_are() -> None:
    text = '{\n  "debug": true,\n  "runtimes": {\n    "kata": { "path": "/k" }\n  }\n}\n'
    written = docker_with(text, PROGRAM, "f")
    assert written == text.replace(
        '"/k" }\n', '"/k" },\n    "graft": {\n      "path": "/usr/bin/graft-runtime"\n    }\n'
    )


def test_what_was_added_after_it_stays() -> None:
    text = '{"runtimes": {"graft": {"path": "/usr/bin/graft-runtime"}, "runc": {"path": "r"}}, "debug": true}'
    assert docker_without(text, "f") == '{"runtimes": {"runc": {"path": "r"}}, "debug": true}'
    text = '{"runtimes": {"graft": {"path": "/usr/bin/graft-runtime"}}, "debug": true}'
    assert docker_without(text, "f") == '{"debug": true}'


def test_another_path_of_grafts_is_replaced() -> None:
    text = '{"runtimes": {"graft": {"path": "/old/graft-runtime"}}}'
    assert docker_with(text, PROGRAM, "f") == text.replace("/old/", "/usr/bin/")
    toml = '[engine.runtimes]\ngraft = ["/old/graft-runtime"]\n'
    assert podman_with(toml, PROGRAM, "f") == toml.replace("/old/", "/usr/bin/")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "f: the file is empty"),
        (" \n", "f: the file is empty"),
        ("{\n  debug: true }", "f: not JSON: Expecting property name enclosed in double quotes: line 2 column 3"),
        ('{"a": NaN}', "f: not JSON: NaN"),
        ("[]", "f: must be an object"),
        ('{"runtimes": []}', "f: runtimes: must be an object"),
        ('{"runtimes": {}, "runtimes": {}}', "f: runtimes: the key is there twice"),
        ('{"runtimes": {"graft": {}, "graft": {}}}', "f: graft: the key is there twice"),
        ('{"a":' * 100 + "1" + "}" * 100, "f: nested too deep"),
    ],
)
def test_a_file_that_docker_could_not_read_is_refused_with_its_place(text: str, said: str) -> None:
    for program in (PROGRAM, None):
        with pytest.raises(UsageError) as caught:
            docker_with(text, program, "f") if program else docker_without(text, "f")
        assert caught.value.message.startswith(said)
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("entry", ['{"path": "/usr/bin/mine"}', f'{{"path": "{PROGRAM}", "runtimeArgs": ["-x"]}}', "1"])
def test_an_entry_that_somebody_else_wrote_is_neither_replaced_nor_removed(entry: str) -> None:
    text = f'{{"runtimes": {{"graft": {entry}}}}}'
    with pytest.raises(ConflictError, match="Graft did not write it"):
        docker_with(text, PROGRAM, "f")
    with pytest.raises(ConflictError, match="Graft did not write it"):
        docker_without(text, "f")


def test_the_default_runtime_is_not_removed() -> None:
    with pytest.raises(ConflictError, match="default-runtime is graft"):
        docker_without(f'{{"default-runtime": "graft", "runtimes": {{"graft": {{"path": "{PROGRAM}"}}}}}}', "f")
    with pytest.raises(ConflictError, match=r"engine\.runtime is graft"):
        podman_without(f'[engine]\nruntime = "graft"\n[engine.runtimes]\ngraft = ["{PROGRAM}"]\n', "f")


LINES = st.sampled_from(
    [
        "# a comment",
        "",
        "[engine]",
        'runtime = "crun"',
        "[engine.runtimes]",
        "  [ engine . runtimes ] # with more",
        'crun = ["/usr/bin/crun"]',
        "[engine.runtimes_flags]",
        "[containers]",
        "pids_limit = 0",
        'runtimes.kata = ["k"]',
        'text = """',
        '"""',
        "[engine.runtimes.more]",
        'engine = { runtime = "crun" }',
    ]
)


@given(st.lists(LINES, max_size=8), st.sampled_from(["\n", "\r\n"]))
def test_install_then_uninstall_gives_podmans_file_back_byte_by_byte(lines: list[str], end: str) -> None:
    text = "".join(line + end for line in lines)
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assume(False)
    try:
        written = podman_with(text, PROGRAM, "f")
    except UsageError:  # a table that nothing can be added to
        return
    wanted = value.setdefault("engine", {}).setdefault("runtimes", {}) | {"graft": [PROGRAM]}
    assert tomllib.loads(written)["engine"]["runtimes"] == wanted
    assert podman_with(written, PROGRAM, "f") == written
    assert (podman_without(written, "f") or "") == text


def test_a_file_that_install_made_for_podman_goes_again() -> None:
    made = podman_with(None, PROGRAM, "f")
    assert tomllib.loads(made) == {"engine": {"runtimes": {"graft": [PROGRAM]}}}
    assert podman_without(made, "f") is None


def test_what_was_added_to_podmans_table_stays() -> None:
    added = podman_with(None, PROGRAM, "f") + 'kata = ["/k"]\n'
    rest = podman_without(added, "f")
    assert rest is not None
    assert tomllib.loads(rest) == {"engine": {"runtimes": {"kata": ["/k"]}}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = [", r"f: not TOML: .*\(at "),
        ("engine.runtimes = {}\n", "f: cannot add to engine.runtimes as it is written there"),
        ("engine = 1\n", "f: cannot add to engine.runtimes as it is written there"),
    ],
)
def test_a_file_that_podman_could_not_read_or_extend_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        podman_with(text, PROGRAM, "f")


CONTAINERD = 'version = 3\nimports = ["/etc/other.toml", "conf.d/*.toml"]\n'


def test_containerd_gets_a_file_that_its_configuration_imports() -> None:
    path, text = containerd_drop_in(CONTAINERD, PROGRAM, "/etc/containerd/config.toml")
    assert path == "/etc/containerd/conf.d/graft.toml"
    runtimes = tomllib.loads(text)["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]
    assert runtimes == {"graft": {"runtime_type": "io.containerd.runc.v2", "options": {"BinaryName": PROGRAM}}}
    assert without_containerd_runtime(text, "f")[1] == PROGRAM


@pytest.mark.parametrize("imports", ["[]", '["/etc/containerd/other.toml"]', '["/etc/*/x.toml"]', '["/etc/*/*.toml"]'])
def test_without_such_an_import_the_operator_is_told_what_to_write(imports: str) -> None:
    with pytest.raises(ByHandError) as caught:
        containerd_drop_in(f"version = 2\nimports = {imports}\n", PROGRAM, "/c.toml")
    first, *rest = caught.value.lines()
    assert first.startswith("graft: /c.toml: it imports no folder")
    runtimes = tomllib.loads("\n".join(rest))["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
    assert runtimes.keys() == {"runc", "graft"}


def test_a_version_that_graft_does_not_know_is_refused() -> None:
    with pytest.raises(UsageError, match="c: version: 1 is not known"):
        containerd_drop_in('root = "/x"\n', PROGRAM, "c")
