"""`graft daemon --replace`: another graftd in the place of the one that runs, and no connection lost."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from graft.errors import KernelError
from graft.splice import client as splice
from graft.splice import daemon_process
from tests.e2e.test_splice_keeper import Connecting, accept_all, processes
from tests.e2e.test_splice_keeper_relays import Stream
from tests.support.installation import Host
from tests.support.plain import Plain, plain
from tests.support.relayed import pair, published, reset, talk
from tests.support.wait import until

pytestmark = pytest.mark.e2e


@pytest.fixture
def relay() -> str:
    return "splice"


def test_another_one_serves_and_no_connection_is_lost(container: Plain) -> None:
    host = container.host
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            streams = [Stream(client, accepted, 50, 1, 0.002), Stream(accepted, client, 50, 2, 0.002)]
            for stream in streams:
                stream.start()
            for _ in range(3):
                graftd, keeper = processes(host)
                time.sleep(0.2)
                said = host.graft("daemon", "--replace").stdout
                assert processes(host)[1] == keeper
                assert processes(host)[0] != graftd
                assert said == f"graftd {processes(host)[0]}\n"
            for stream in streams:
                stream.check()


def test_no_client_is_refused_and_none_is_reset(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        client = Connecting(container.host, port, reads=True)
        client.start()
        server = accept_all(listener, client.ending)
        server.start()
        try:
            for _ in range(3):
                before = client.made
                container.host.graft("daemon", "--replace")
                until("clients", lambda before=before: client.made > before + 20)  # type: ignore[misc]
        finally:
            client.ending.set()
            client.join()
            server.join()
        assert client.failures == []


def test_where_the_new_one_does_not_start_the_previous_one_runs_again(
    container: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no module of that name >&2\nexit 1\n")
    broken.chmod(0o700)
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            talk(client, accepted)
            before = processes(container.host)
            monkeypatch.setattr(sys, "executable", str(broken))
            with pytest.raises(KernelError, match="did not start, the previous one runs again"):
                daemon_process.replace(container.host.settings)
            after = processes(container.host)
            assert after[0] != before[0] and after[1] == before[1]
            talk(client, accepted)
    log = Path(container.host.settings.run_dir / "graftd.log").read_text()
    assert "no module of that name" in log
    assert "the new graftd is not ready; the previous one is started again" in log


def test_one_without_a_keeper_is_not_replaced_and_serves_on(container: Plain) -> None:
    container.host.start_daemon()
    with container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            refused = container.host.graft("daemon", "--replace", status=1)
            assert "has no keeper" in refused.stderr
            talk(client, accepted)
    splice.stop(container.host.settings)


def test_where_none_runs_none_is_replaced(container: Plain) -> None:
    splice.stop(container.host.settings)
    assert "no daemon runs" in container.host.graft("daemon", "--replace", status=3).stderr


def test_what_the_kernel_relays_is_reset(host: Host) -> None:
    with plain(host, "kernel") as container, container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            for _ in range(4):
                talk(client, accepted)
            host.graft("daemon", "--replace")
            assert reset(client)
            assert reset(accepted)
