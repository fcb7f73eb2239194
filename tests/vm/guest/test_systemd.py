"""Units of a real systemd, and those of examples/systemd. For a guest of tests/vm: here it is the host itself."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shell import output, run
from tests.support.wait import until
from tests.vm.guest.package import main_pid

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples" / "systemd"
GRAFT = Path("/usr/local/bin/graft")  # where the examples expect it
PORT = 8080
SERVER = (
    "import http.server as h\n"
    "class Handler(h.BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        self.send_response(200); self.end_headers(); self.wfile.write(self.client_address[0].encode())\n"
    "h.HTTPServer(('0.0.0.0', 80), Handler).serve_forever()\n"
)


@pytest.fixture
def graft() -> Iterator[Path]:
    """The command where the examples expect it. Afterwards nothing of Graft is left."""
    assert Path("/run/systemd/system").is_dir(), "this is for a machine that systemd runs"
    if not GRAFT.exists():
        GRAFT.symlink_to(ROOT / ".venv/bin/graft")
    yield GRAFT
    run(["systemctl", "stop", "test-web", "test-first", "graft-web", "graftd"])
    run([GRAFT, "down", "--force", "--forget"])


def answer() -> str:
    """The endpoint's answer, or nothing. Ask it once a second at most: the server starts on the same core."""
    done = subprocess.run(["curl", "-s", "-m", "10", f"http://127.0.0.1:{PORT}/"], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def listens(port: int) -> bool:
    return f":{port} " in output(["ss", "-Hltn"])


def start(unit: str, *options: str) -> None:
    output(["systemd-run", "--quiet", f"--unit={unit}", "--collect", *options, "/usr/bin/python3", "-c", SERVER])


def test_what_starts_in_an_attached_slice_is_served_on_its_endpoint_until_it_is_detached(graft: Path) -> None:
    output(["systemd-run", "--quiet", "--unit=test-first", "--collect", "--slice=test.slice", "sleep", "1000"])
    output([graft, "ep", "add", "web", f"0.0.0.0:{PORT}"])
    output([graft, "attach", "--cgroup", "test.slice", "-i", "0.0.0.0:80=web"])
    start("test-web", "--slice=test.slice")
    assert until("the server", answer, timeout=60, pause=1) == "127.0.0.1"
    assert not listens(80)
    output([graft, "detach", "--cgroup", "test.slice"])
    assert answer() == "" and not listens(PORT)


def test_a_unit_with_a_network_of_its_own_is_published_while_it_runs(graft: Path) -> None:
    shutil.copy(EXAMPLES / "graftd.service", "/run/systemd/system/")
    output(["systemctl", "daemon-reload"])
    output(["systemctl", "start", "graftd.service"])
    start("test-web", "--property=PrivateNetwork=yes")
    output([graft, "ep", "add", "web", f"0.0.0.0:{PORT}"])
    output([graft, "attach", "--cgroup", "test-web.service", "-i", "0.0.0.0:80=web"])
    assert until("the server", answer, timeout=60, pause=1) == "127.0.0.1"
    assert "splice" in output([graft, "ps"])
    output([graft, "detach", "--cgroup", "test-web.service"])
    assert answer() == ""


@pytest.mark.parametrize("how", [["kill", "--signal=KILL", "--kill-who=main"], ["reload"]])
def test_systemd_keeps_the_connections_of_a_graftd_that_dies_or_is_replaced(graft: Path, how: list[str]) -> None:
    shutil.copy(EXAMPLES / "graftd.service", "/run/systemd/system/")
    output(["systemctl", "daemon-reload"])
    output(["systemctl", "start", "graftd.service"])  # when this returns, graftd has said that it is ready
    start("test-web", "--property=PrivateNetwork=yes")
    output([graft, "ep", "add", "web", f"0.0.0.0:{PORT}"])
    output([graft, "attach", "--cgroup", "test-web.service", "-i", "0.0.0.0:80=web"])
    until("the server", answer, timeout=60, pause=1)
    for _ in range(3):
        before = main_pid("graftd.service")
        with socket.create_connection(("127.0.0.1", PORT), timeout=120) as client:
            client.sendall(b"GET / HTTP/1.0\r\n")
            until("it is relayed", lambda: relayed(graft) == 1, timeout=60, pause=1)
            output(["systemctl", *how, "graftd.service"])
            until("another graftd", lambda: main_pid("graftd.service") not in (0, before), timeout=60)  # noqa: B023
            with socket.create_connection(("127.0.0.1", PORT), timeout=120) as other:  # nobody is refused
                client.sendall(b"\r\n")
                assert client.makefile("rb").read().endswith(b"127.0.0.1")
                other.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert other.makefile("rb").read().endswith(b"127.0.0.1")
    assert main_pid("graftd.service")
    output([graft, "detach", "--cgroup", "test-web.service"])
    assert answer() == ""


def relayed(graft: Path) -> int:
    [one] = json.loads(output([graft, "ps", "--json"]))
    return int(one["relay"]["connections"])


def test_the_example_of_nginx_in_a_unit_serves_and_leaves_nothing(graft: Path) -> None:
    Path("/etc/graft/policies").mkdir(parents=True, exist_ok=True)
    Path("/etc/graft/policies/web.yaml").write_text(
        f"name: web\nendpoints: {{nx4: '0.0.0.0:{PORT}'}}\ningress: [{{bind: '*:80', endpoint: nx4}}]\n"
    )
    shutil.copy(EXAMPLES / "graft-web.service", "/run/systemd/system/")
    output(["systemctl", "daemon-reload"])
    output(["systemctl", "start", "graft-web.service"])
    assert "nginx" in until("nginx", answer, timeout=120, pause=1)
    assert not listens(80)
    output(["systemctl", "stop", "graft-web.service"])
    assert answer() == "" and "web" not in output([graft, "ps"])


def test_the_example_of_endpoints_makes_them_and_takes_them_away(graft: Path) -> None:
    shutil.copy(EXAMPLES / "graft-endpoints.service", "/run/systemd/system/")
    output(["systemctl", "daemon-reload"])
    output(["systemctl", "start", "graft-endpoints.service"])
    assert "nx4" in output([graft, "ep", "show"])
    output(["systemctl", "stop", "graft-endpoints.service"])
    assert "nx4" not in output([graft, "ep", "show"])
