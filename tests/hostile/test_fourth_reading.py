"""What a fourth reading found: where a connected datagram socket really sends, what an image says of its engine."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from graft.errors import RefusedError
from graft.model.settings import Settings
from graft.oci import request
from graft.oci.options import RuntimeOptions
from graft.oci.request import Request, Source
from tests.hostile.conftest import Confine, Without
from tests.hostile.test_afterwards import apply
from tests.hostile.test_datagrams import came, datagrams
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4

pytestmark = pytest.mark.e2e

OTHER4 = "10.98.0.77"
INET, DGRAM = 2, 2
SOL_UDP, UDP_CORK = socket.IPPROTO_UDP, 1

# ---- IPv4 sends of a connected socket go where its last datagram went that one send began and another completed ----


def policy(*to: str) -> str:
    rules = ", ".join(f"{{to: {one}, endpoint: out}}" for one in to)
    return f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\negress: [{rules}]\ndefault: deny\n"


def strays(host: Host, confine: Confine, folder: Path) -> list[str | None]:
    """Who sends to a destination before, and after its rule is gone, by a socket that is connected to another one."""
    host.client.run("ip", "address", "replace", f"{OTHER4}/24", "dev", "eth0")
    with datagrams(host, OTHER4) as gone, datagrams(host) as peer:
        steps = ["make", INET, DGRAM, 0, "connect", CLIENT4, peer.getsockname()[1]]
        steps += ["option", SOL_UDP, UDP_CORK, "send", OTHER4, gone.getsockname()[1]]
        steps += ["bytes", SOL_UDP, UDP_CORK, "00000000", "wait", "send", "-", "-", "wait"]
        one = confine(host, "direct", policy(CLIENT4, OTHER4), *steps)
        assert one.lines(5)[2:] == ["option ok", "send ok", "bytes ok"]
        before = came(gone, 10)
        apply(host, one, folder, policy(CLIENT4))
        one.goes_on()
        one.lines(6)
        return [before, came(gone)]


def test_a_connected_socket_sends_to_no_destination_that_lost_its_rule(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    before, after = strays(host, confine, tmp_path)
    assert before is not None
    assert after is None


def test_control_where_only_its_peer_is_judged_it_does(without: Without, confine: Confine, tmp_path: Path) -> None:
    assert None not in strays(without("kept flow"), confine, tmp_path)


# ---- an image's annotations replace those by which podman is known, and its own look like the operator's then --------


def configuration(cgroup: str) -> dict[str, Any]:
    """What podman writes for an image with two annotations of its own (seen with 4.3, which adds `io.podman.*`)."""
    asked = {"io.container.manager": "docker", "graft.policy": "secret", "graft.allow-net-admin": "true"}
    sets = {"bounding": ["CAP_NET_ADMIN"]}
    return {"annotations": asked, "linux": {"cgroupsPath": cgroup}, "process": {"capabilities": sets}}


PODMANS = [
    "machine.slice:libpod:0e7ce416218d",
    "/libpod_parent/libpod-0e7ce416218d",
    "/a/b/libpod-payload-0e7ce416218d",
]
DOCKERS = "system.slice:docker:0e7ce416218d"


def choose(folder: Path, cgroup: str) -> str:
    (folder / "policies").mkdir()
    (folder / "policies/secret.yaml").write_text("name: secret\n")
    settings = Settings.from_environment({"GRAFT_STATE_DIR": str(folder)})
    asked = Request(Source.ANNOTATION, "secret")
    return request.choose_policy(settings, asked, configuration(cgroup), RuntimeOptions(), {}).name


@pytest.mark.parametrize("cgroup", PODMANS)
def test_an_image_of_podmans_does_not_pass_for_another_engines(tmp_path: Path, cgroup: str) -> None:
    with pytest.raises(RefusedError, match="is not open"):
        choose(tmp_path, cgroup)
    with pytest.raises(RefusedError, match="CAP_NET_ADMIN"):
        request.check_capabilities(configuration(cgroup), RuntimeOptions(), own_user_namespace=False)


def test_control_an_annotation_of_another_engines_is_the_operators(tmp_path: Path) -> None:
    assert choose(tmp_path, DOCKERS) == "secret"
    request.check_capabilities(configuration(DOCKERS), RuntimeOptions(), own_user_namespace=False)
