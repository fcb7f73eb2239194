"""The README as somebody goes through it who has just installed the package: an engine with the runtime, a policy of
one's own, a look at what a container does, the units that tell, and all of it taken back.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shell import output, run
from tests.support.wait import until
from tests.vm.guest.package import is_active, make_image

PORT = 8090
POLICY = f"""name: till
open: true
endpoints:
  till4: 0.0.0.0:{PORT}
ingress:
  - bind: 0.0.0.0:80
    endpoint: till4
default: deny
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    """docker with Graft's runtime in its configuration, as the README has one do; and out of it again."""
    output(["systemctl", "start", "docker.service"], timeout=300)
    output(["graft", "runtime", "install", "docker"])
    output(["systemctl", "reload", "docker"], timeout=300)
    make_image()
    yield
    run(["docker", "rm", "--force", "till"], timeout=120)
    output(["graft", "runtime", "uninstall", "docker"])
    configuration = Path("/etc/docker/daemon.json")  # dockerd forgets what is in it no longer when it is started again
    assert not configuration.exists() or "graft" not in configuration.read_text()


@pytest.fixture(scope="module")
def till(engine: None) -> str:
    """A container with a policy of one's own: a web server that may do nothing but that."""
    path = Path("/etc/graft/policies/till.yaml")
    path.write_text(POLICY)
    assert "ok" in output(["graft", "policy", "check", path])
    tries = "while sleep 1; do busybox nc -w 1 192.0.2.7 80 </dev/null; done"  # which is not granted
    script = f"{tries} & exec httpd -f -p 0.0.0.0:80 -h /etc/graft"
    options = ["--name=till", "--network=none", "--runtime=graft", "-e", "GRAFT_POLICY=till"]
    output(["docker", "run", "--detach", *options, "box", "sh", "-c", script], timeout=120)
    return "till"


def journal(*matches: str) -> list[dict[str, str]]:
    """The entries that match."""
    return [json.loads(line) for line in output(["journalctl", "--no-pager", "-o", "json", *matches]).splitlines()]


def container() -> str:
    """The name that `graft ps` shows."""
    return str(next(one["name"] for one in json.loads(output(["graft", "ps", "--json"])) if one["policy"] == "till"))


def test_a_container_of_docker_with_a_policy_of_ones_own_answers_at_its_endpoint(till: str) -> None:
    command = ["curl", "-s", "-f", "-m", "10", f"http://127.0.0.1:{PORT}/environment"]
    until("an answer", lambda: b"GRAFT_STATE_DIR" in subprocess.run(command, capture_output=True).stdout, 100, pause=1)
    assert ":80 " not in output(["ss", "-Hltn"])


def test_what_it_may_do_is_explained(till: str) -> None:
    assert f"till4 0.0.0.0:{PORT}" in output(["graft", "explain", container(), "bind", "0.0.0.0:80"])
    assert "refused" in output(["graft", "explain", container(), "connect", "192.0.2.7:80"])


def test_what_it_is_refused_is_in_the_journal(till: str) -> None:
    output(["systemctl", "start", "graft-trace.service"])
    found = ("-t", "graft-trace", f"GRAFT_CONTAINER={container()}", "GRAFT_OUTCOME=refused", "GRAFT_ADDRESS=192.0.2.7")
    entry = until("a refusal", lambda: journal(*found), timeout=100, pause=1)[0]
    assert (entry["GRAFT_CALL"], entry["GRAFT_PORT"]) == ("connect", "80")
    output(["systemctl", "stop", "graft-trace.service"])
    assert output(["systemctl", "show", "--value", "--property=Result", "graft-trace.service"]) == "success\n"


def test_what_it_does_is_counted_for_prometheus_by_the_packages_unit(till: str) -> None:
    output(["systemctl", "start", "graft-metrics.service"])

    def answer() -> str:
        return subprocess.run(
            ["curl", "-s", "-m", "20", "http://127.0.0.1:9469/metrics"], capture_output=True, text=True
        ).stdout

    text = until("an answer", answer, timeout=100, pause=1)
    assert "\ngraft_up 1.0\n" in text
    refused = f'graft_decisions_total{{container="{container()}",decision="refused_connect"'
    assert any(line.startswith(refused) and not line.endswith(" 0.0") for line in text.splitlines())
    assert f'graft_call_seconds_count{{container="{container()}"' in text
    output(["systemctl", "stop", "graft-metrics.service"])
    assert not is_active("graft-metrics.service")


def test_graftd_says_in_the_journal_whom_it_serves() -> None:
    """The unit with a network of its own, which the tests before this one have attached."""
    [entry] = journal("-u", "graftd.service", "GRAFT_CONTAINER=test-private.service")[:1]
    assert "served" in entry["MESSAGE"] and entry["SYSLOG_IDENTIFIER"] == "graftd"
