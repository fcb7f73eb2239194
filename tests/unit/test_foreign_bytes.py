"""Bytes from outside Graft: each reader refuses what it cannot use, with one clear line, and never hangs.

Every reader of tests/support/readers.py gets random bytes, changed ones, and trees of the wrong shape. The same ones
each time, so that a push does not fail by chance; FOREIGN_BYTES_EXAMPLES=10000 tries others, so many for each reader.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.errors import GraftError
from graft.model.printable import printable
from tests.support.readers import READERS, RECORD, Reader

_MORE = os.environ.get("FOREIGN_BYTES_EXAMPLES")
_EXAMPLES = settings(
    max_examples=int(_MORE or 60),
    derandomize=_MORE is None,
    database=None,
    deadline=None,  # pytest's own limit ends a reader that hangs; this machine may be busy
    suppress_health_check=[HealthCheck.too_slow],
)
BY_NAME = {reader.name: reader for reader in READERS}

# What has a meaning to one reader or another, where random bytes seldom hit it.
BLANKS = [b"\0", b"\n", b"\r", b"\x0b", b"\x0c", b"\x1c", b"\xc2\x85", b"\xe2\x80\xa8", b" ", b"\t"]
SIGNS = [bytes([sign]) for sign in b")([{}]\"':,-=/*%#&!.\\\x1b\xff"]
PHRASES = [b"0::/", b" - cgroup2 ", b"\\040", b"Tgid:\t1", b"flags:\t0", b"!<%0A>", b"&a *a"]
PHRASES += [b"9" * 400, b"-1", b"1e999", b"null", b"\\ud800"]
WORDS = st.sampled_from([*BLANKS, *SIGNS, *PHRASES])
NUMBERS = st.sampled_from([0, -1, 1, 65536, 1 << 31, 1 << 32, 1 << 64, 10**400, 0.5, 1e308])
NAMES = st.sampled_from(
    ["", "\0", "a\nb", "\x1b[31m", "\ud800", "../..", "/", "x" * 300, "SCMP_ACT_NOTIFY", "CAP_NET_ADMIN"]
)
TREES = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def edited(draw: st.DrawFn, seed: bytes) -> bytes:
    """``seed`` with some of it cut out, doubled, or put over."""
    raw = seed
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        end = draw(st.integers(start, min(len(raw), start + 12)))
        new = draw(WORDS | st.binary(max_size=8) | st.just(raw[start : start + 64] * 2))
        raw = raw[:start] + new + raw[end:]
    return raw


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every part of a tree, as what holds it and its key there."""
    found: list[tuple[Any, Any]] = []
    left = [tree]
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        left += [holder[key] for key in keys]
    return found


@st.composite
def misshapen(draw: st.DrawFn, seed: bytes) -> bytes:
    """The tree in ``seed`` (JSON) with parts that are something else, or missing."""
    tree = json.loads(seed)
    for _ in range(draw(st.integers(1, 2))):
        if not (parts := places(tree)):
            break
        holder, key = draw(st.sampled_from(parts))
        if draw(st.booleans()) or not isinstance(holder, dict):
            holder[key] = draw(TREES)
        else:
            del holder[key]
    return json.dumps(tree).encode()


def foreign(reader: Reader) -> st.SearchStrategy[bytes]:
    """Bytes for one reader."""
    kinds: list[st.SearchStrategy[bytes]] = [st.binary(max_size=256), st.lists(WORDS, max_size=12).map(b"".join)]
    for seed in reader.seeds:
        kinds.append(edited(seed))
        if seed[:1] in (b"{", b"["):
            kinds += [misshapen(seed), misshapen(seed)]
    return st.one_of(kinds)


def refused(reader: Reader, raw: bytes) -> Exception | None:
    """How ``reader`` refuses ``raw``; None where it takes it. Fails the test for any other exception."""
    try:
        reader.read(raw)
    except reader.allowed as error:
        return error
    return None


@pytest.mark.parametrize("name", BY_NAME)
@given(data=st.data())
@_EXAMPLES
def test_any_bytes_are_taken_or_refused_with_one_line(name: str, data: st.DataObject) -> None:
    reader = BY_NAME[name]
    error = refused(reader, data.draw(foreign(reader)))
    if isinstance(error, GraftError):
        assert error.message
        assert not any("\n" in line for line in error.lines())
        assert all(printable(line).isprintable() for line in error.lines())


@pytest.mark.parametrize("name", BY_NAME)
def test_what_a_reader_is_for_is_taken(name: str) -> None:
    reader = BY_NAME[name]
    assert reader.seeds
    for seed in reader.seeds:
        error = refused(reader, seed)
        # The two that stand for an answer which says that something failed.
        assert error is None or str(error) in ("x", "[Errno 2] sock_diag: No such file or directory")


JSON_READERS = [reader.name for reader in READERS if reader.seeds[0][:1] in (b"{", b"[")]
NO_JSON = [b'{"a":' * 10_000, b"[" * 200 + b"]" * 200, b"9" * 5000, b"NaN", b"\xff", b"{"]


@pytest.mark.parametrize("name", JSON_READERS)
@pytest.mark.parametrize("raw", [b"[" * 10_000, *NO_JSON])
def test_json_that_is_none_or_too_deep_is_refused(name: str, raw: bytes) -> None:
    error = refused(BY_NAME[name], raw)
    assert error is not None
    assert any(words in str(error) for words in ("nested too deep", "not JSON", "cannot read what it says"))


def config(**parts: object) -> bytes:
    return json.dumps(parts).encode()


def record(**changes: object) -> bytes:
    return json.dumps({**json.loads(RECORD), **changes}).encode()


REFUSED = [
    ("config.json", b"[]", "config.json: must be a mapping, not a list"),
    ("config.json", config(annotations=[1]), "annotations: must be a mapping, not a list"),
    ("config.json", config(annotations={"graft.policy": 1}), "annotations.graft.policy: must be text, not a number"),
    ("config.json", config(process=[1]), "process: must be a mapping, not a list"),
    ("config.json", config(process={"env": {"A": "b"}}), "process.env: must be a list, not a mapping"),
    ("config.json", config(process={"env": ["A=b", 1]}), r"process.env\[1\]: must be text, not a number"),
    ("config.json", config(process={"capabilities": {"bounding": "x"}}), "bounding: must be a list, not text"),
    ("config.json", config(linux={"namespaces": ["network"]}), r"namespaces\[0\]: must be a mapping, not text"),
    (
        "config.json",
        config(linux={"namespaces": [{"type": "user", "path": "\0"}]}),
        "linux.namespaces.path: .* has a NUL",
    ),
    ("config.json", config(annotations={"run.oci.x": "..\0"}), r"annotations.run.oci.x: '..\\x00' has a NUL"),
    ("config.json", config(annotations={"run.oci.x\0y": "z"}), r"annotations: 'run.oci.x\\x00y' has a NUL"),
    ("config.json", config(linux={"seccomp": {"syscalls": {}}}), "linux.seccomp.syscalls: must be a list"),
    (
        "config.json",
        config(linux={"seccomp": {"syscalls": [{"action": []}]}}),
        r"\[0\].action: must be text, not a list",
    ),
    (
        "config.json",
        config(hooks={"createRuntime": [None]}),
        r"hooks.createRuntime\[0\]: must be a mapping, not nothing",
    ),
    ("seccomp profile", b'{"defaultAction": "x", "syscalls": [{"names": "bind"}]}', "names: must be a list, not text"),
    ("seccomp profile", b'{"defaultAction": {}}', "defaultAction: must be text, not a mapping"),
    ("state", b'{"id": "a", "pid": true}', "state.pid: must be a number"),
    ("state", b'{"id": "a", "pid": 1e999}', "state.pid: must be a number"),
    ("state", b'{"id": "a", "pid": 99999999999999999999}', "state.pid: must be a number"),
    ("state", b'{"id": "a", "annotations": []}', "state.annotations: must be a mapping"),
    ("state", b'{"id": "a", "fds": 5}', "state.fds: must be a list"),
    ("state", b'{"id": "a", "bundle": "/b\\u0000"}', "state.bundle: .* is not a path"),
    ("state", b'{"state": [1]}', "state.state: must be a mapping"),
    ("record", b"{}", "7.json: no cgroup and no endpoints and no id"),
    ("record", record(endpoints=None) + b"}", "7.json: not JSON"),
    ("record", record(transport="teleport"), "7.json: transport: 'teleport' is not a transport"),
    ("record", record(netns="12"), "7.json: netns: must be a number"),
    ("record", record(id=8), "7.json: id 8 at "),
    ("record", record(cgroup="relative"), "7.json: id 7 at 'relative' is not a container"),
    ("record", record(cgroup="/sys/fs/cgroup/../../etc"), "is not a container"),
    ("docker inspect", b"[" * 10_000, "cannot read the output"),
    ("docker inspect", b"a /web 42\n", "cannot read the output .*'a /web 42'"),
    ("daemon's request", b'{"do": ["stop"]}', "do: must be text"),
    ("daemon's request", b'{"container": "x"}', "container: must be a number"),
    ("daemon's answer", b"[1]", "must be a mapping"),
    ("self-test", b"[]", "must be a mapping"),
    ("runtime features", b'{"linux": [1]}', "linux: must be a mapping"),
    ("sock_diag", bytes(16), "a message of 0 bytes"),
    ("socket of sock_diag", bytes(71), "a socket in 71 bytes"),
    ("BTF", b"", "too short"),
]


@pytest.mark.parametrize(("name", "raw", "message"), REFUSED)
def test_what_is_refused_names_its_field(name: str, raw: bytes, message: str) -> None:
    with pytest.raises(BY_NAME[name].allowed, match=message):
        BY_NAME[name].read(raw)


def test_parts_that_are_null_are_as_good_as_missing() -> None:
    for part in ("annotations", "process", "linux", "hooks"):
        BY_NAME["config.json"].read(config(**{part: None}))
    BY_NAME["config.json"].read(config(process={"env": None, "capabilities": {"bounding": None}}))
    BY_NAME["state"].read(b'{"id": "a", "pid": null, "annotations": null, "fds": null}')
