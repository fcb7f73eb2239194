"""graftd with its modules compiled, and in plain Python where it has to be: the same, and each is what it says."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from graft.splice import daemon_process, native
from graft.splice.native.sources import MODULES, library
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import Plain, plain
from tests.support.relayed import pair, published, talk, transfer
from tests.support.shell import run
from tests.support.udp import udp

pytestmark = pytest.mark.e2e


LIBRARY = library(Path(native.__file__).parent.parent)
PRINT_FILES = f"""
import importlib
from graft.splice import native
native.use()
for name in {MODULES}:
    print(importlib.import_module("graft.splice." + name).__file__)
"""


@pytest.fixture(params=["compiled", "python"])
def graftd(request: pytest.FixtureRequest, host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plain]:
    """A container whose graftd was started anew, in one of its forms."""
    daemon_process.stop(host.settings)
    if request.param == "python":
        monkeypatch.setenv(native.NOT_COMPILED, "1")
    with plain(host) as container:
        yield container
    daemon_process.stop(host.settings)


def is_compiled(request: pytest.FixtureRequest) -> bool:
    return "compiled" in request.node.name.rpartition("[")[2]


def test_graftd_has_loaded_the_compiled_code_or_not(graftd: Plain, request: pytest.FixtureRequest) -> None:
    published(graftd)
    mapped = Path(f"/proc/{graftd.daemon()}/maps").read_text()  # proc(5)
    assert (f"/{LIBRARY}." in mapped) == is_compiled(request)
    assert (f"{os.path.dirname(native.__file__)}/" in mapped) == is_compiled(request)


def test_each_module_is_the_compiled_one(root: None) -> None:
    files = run([sys.executable, "-P", "-c", PRINT_FILES]).stdout.split()
    assert len(files) == len(MODULES)
    assert [file for file in files if not file.endswith(".so")] == []


def test_bytes_arrive_both_ways(graftd: Plain) -> None:
    with graftd.listener() as listener:
        port = published(graftd)
        for there, back, half_close in itertools.product((0, 1, 3_000_000), (0, 70_000), (True, False)):
            client, accepted = pair(graftd, listener, port)
            with client, accepted:
                talk(client, accepted)
                transfer(client, accepted, there, back, half_close, seed=there + back)


def test_datagrams_arrive_and_are_answered(graftd: Plain) -> None:
    port = graftd.host.port()
    server = graftd.udp()
    server.bind(("0.0.0.0", 53))
    endpoint, out = graftd.host.endpoint(f"0.0.0.0:{port}"), graftd.host.endpoint("0.0.0.0:dynamic")
    graftd.attach("-i", f"0.0.0.0:53={endpoint}", "-e", f"{CLIENT4}/32={out}")
    with server, closing(udp(graftd.host.client, CLIENT4)) as client:
        for number in range(100):
            client.sendto(b"question %d" % number, (HOST4, port))
            data, peer = server.recvfrom(100)
            assert (data, peer) == (b"question %d" % number, client.getsockname())
            server.sendto(b"answer", peer)
            assert client.recvfrom(100) == (b"answer", (HOST4, port))
