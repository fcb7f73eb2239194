"""`graft ep set` and `graft ep del` while programs run: the next call follows, open sockets stay as they are."""

from __future__ import annotations

import pytest

from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4

pytestmark = pytest.mark.e2e


def test_the_next_bind_follows_an_endpoint_that_was_changed(host: Host, programs: Programs) -> None:
    first, second = host.port(), host.port()
    name = host.endpoint(f"0.0.0.0:{first}")
    bind = ["socket", "4", "bind", "0.0.0.0", "80", "listen", "name", "wait"]
    program = host.start("-i", f"0.0.0.0:80={name}", "--", programs["calls"], *bind, *bind, talk=True)
    program.says("name 0.0.0.0 80")
    host.graft("ep", "set", name, f"{HOST4}:{second}")
    assert host.netns.listens(first) and not host.netns.listens(second)
    program.tell("\n")
    program.until("the second bind", lambda: program.said.count("name 0.0.0.0 80") == 2)
    assert host.netns.listens(first) and host.netns.listens(second)
    host.client.connected(HOST4, second).close()


def test_the_next_connect_follows_an_endpoint_that_was_changed(host: Host, programs: Programs) -> None:
    first, second, listener = host.port(), host.port(), host.client.listener()
    name = host.endpoint(f"{HOST4}:{first}")
    connect = ["socket", "4", "connect", CLIENT4, listener.getsockname()[1], "wait"]
    program = host.start("-e", f"0.0.0.0/0={name}", "--", programs["calls"], *connect, *connect, talk=True)
    program.says("connect ok")
    assert listener.accept()[1] == (HOST4, first)
    host.graft("ep", "set", name, f"{HOST4}:{second}")
    program.tell("\n")
    program.until("the second connect", lambda: program.said.count("connect ok") == 2)
    assert listener.accept()[1] == (HOST4, second)
    listener.close()


def test_an_endpoint_in_use_is_deleted_only_by_force_and_the_next_call_is_refused(
    host: Host, programs: Programs
) -> None:
    name = host.endpoint("0.0.0.0:dynamic")
    listener = host.client.listener()
    port = listener.getsockname()[1]
    steps = ["socket", "4", "connect", CLIENT4, "9", "wait", "connect32", CLIENT4, port, "connect", CLIENT4, port]
    program = host.start("-e", f"0.0.0.0/0={name}", "--", programs["calls"], *steps, talk=True)
    program.says("connect ECONNREFUSED")
    refused = host.graft("ep", "del", name, status=4)
    assert refused.stderr.count("\n") == 1 and name in refused.stderr
    host.graft("ep", "del", name, "--force")
    program.tell("\n")
    assert program.wait() == 0
    said = program.said.splitlines()
    assert said[1] == "connect32 EACCES"
    assert said[2] in ("connect EACCES", "connect ENETUNREACH")
    listener.settimeout(0)
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()


def test_an_endpoint_keeps_its_family_while_rules_in_use_need_it(host: Host) -> None:
    name = host.endpoint("0.0.0.0:8080")
    program = host.start("-i", f"0.0.0.0:80={name}", "--", "sh", "-c", "echo up; sleep 1000")
    program.says("up")
    refused = host.graft("ep", "set", name, "[::]:8080", status=4)
    assert refused.stderr.count("\n") == 1 and "IPv4" in refused.stderr
    program.stop()
    host.graft("ep", "set", name, "[::]:8080")
