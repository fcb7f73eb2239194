"""Who may run Graft: the host's root. Everybody else is told so at once, in one line, and nothing is begun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.installation import GRAFT, Host
from tests.support.shell import output, run

pytestmark = pytest.mark.e2e

# (One that may read a checkout in root's home.)
READS = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *READS, "--")
USER_NAMESPACE = ("unshare", "--user", "--map-root-user", "--")
PID_NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--")
NO_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--")
COMMANDS = (
    ["up"],
    ["down"],
    ["doctor"],
    ["ps"],
    ["ep", "show"],
    ["ep", "add", "other", "127.0.0.1:1"],
    ["attach", "--cgroup", "box", "-i", "*:80=other"],
    ["detach", "--cgroup", "box"],
    ["policy", "apply", "policy.yaml"],
    ["run", "-i", "*:80=other", "--", "true"],
    ["export"],
    ["watch"],
    ["daemon"],
    ["listen"],
    ["bench"],
)


@pytest.mark.parametrize(
    "who",
    [NOBODY, USER_NAMESPACE, NO_CAPABILITIES, PID_NAMESPACE],
    ids=["nobody", "namespace", "confined", "other processes"],
)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_without_the_hosts_root_says_so_in_one_line(host: Host, who: list[str], words: list[str]) -> None:
    done = run([*who, GRAFT, *words], environment=host.environment, status=5)
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("graft: this needs ") and "root" in line


@pytest.mark.parametrize("asks", [True, False])
def test_the_runtime_of_a_rootless_engine_starts_what_asks_for_no_policy_and_refuses_the_rest(
    host: Host, tmp_path: Path, asks: bool
) -> None:
    annotations = {"graft.policy": str(tmp_path / "policy.yaml")} if asks else {}
    (tmp_path / "policy.yaml").write_text("name: p\n")
    (tmp_path / "config.json").write_text(json.dumps({"annotations": annotations}))
    words = ("create", "--bundle", str(tmp_path), "box")
    command = [*USER_NAMESPACE, str(GRAFT.with_name("graft-runtime")), *words]
    environment = {**host.environment, "GRAFT_RUNTIME": "/bin/echo"}
    if not asks:
        assert output(command, environment=environment).split() == list(words)
        return
    done = run(command, environment=environment, status=1)
    assert done.stdout == "" and "needs the host's root" in done.stderr
