"""The lines of `graft run -v`."""

from __future__ import annotations

import errno

from graft.model.endpoint import parse_endpoint
from graft.model.sockaddr import Sockaddr
from graft.swap.call_log import format_entry
from graft.swap.decision import Action, Call, Decision
from graft.swap.supervisor import LogEntry

WEB = Sockaddr(4, bytes(16), 80)
ENDPOINTS = {
    5: parse_endpoint("nx4", "0.0.0.0:8080"),
    6: parse_endpoint("any", "0.0.0.0:dynamic"),
    7: parse_endpoint("rtp", "0.0.0.0:20000-20100"),
}


def logged(call: Call, address: Sockaddr | None, decision: Decision, error: int = 0, port: int = 0) -> str:
    return format_entry(LogEntry(call, address, decision, error, port), ENDPOINTS)


def test_a_bind_names_its_endpoint() -> None:
    assert logged(Call.BIND, WEB, Decision(Action.TO_HOST, 5)) == "graft: bind 0.0.0.0:80 -> nx4 = 0.0.0.0:8080"


def test_a_bind_shows_the_port_that_it_got() -> None:
    made = logged(Call.BIND, Sockaddr(4, bytes(16), 0), Decision(Action.TO_HOST, 6), port=40123)
    assert made == "graft: bind 0.0.0.0:0 -> any = 0.0.0.0:40123"
    made = logged(Call.BIND, Sockaddr(4, bytes(16), 5003), Decision(Action.TO_HOST, 7), port=20003)
    assert made == "graft: bind 0.0.0.0:5003 -> rtp = 0.0.0.0:20003"


def test_a_connect_names_its_source_endpoint() -> None:
    assert logged(Call.CONNECT, WEB, Decision(Action.TO_HOST, 5)) == "graft: connect 0.0.0.0:80 from nx4 = 0.0.0.0:8080"


def test_a_deleted_endpoint_is_named_by_its_id() -> None:
    assert logged(Call.BIND, WEB, Decision(Action.TO_HOST, 9)) == "graft: bind 0.0.0.0:80 -> endpoint 9"


def test_a_refusal_and_a_failure_show_their_errno() -> None:
    assert logged(Call.BIND, WEB, Decision(Action.REFUSE, error=errno.EACCES)) == "graft: bind 0.0.0.0:80: EACCES"
    taken = logged(Call.BIND, WEB, Decision(Action.TO_HOST, 5), errno.EADDRINUSE)
    assert taken == "graft: bind 0.0.0.0:80: EADDRINUSE"


def test_a_call_that_runs_unchanged_is_logged_too() -> None:
    assert logged(Call.LISTEN, None, Decision(Action.RESUME)) == "graft: listen: unchanged"
    assert logged(Call.BIND, WEB, Decision(Action.TO_CONTAINER)) == "graft: bind 0.0.0.0:80: back to the container"
