"""A container's config.json: read, edited and written, with nothing else changed."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from graft.errors import UsageError
from graft.oci import bundle
from graft.oci.bundle import HOOK, Edit, edit_config, read_config, write_config
from graft.oci.request import Request, Source, requested

LISTENER = "/run/graft/oci/abc/seccomp"
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
