"""The lines of `graft run -v`."""

from __future__ import annotations

import errno

from graft.model.endpoint import parse_endpoint
from graft.model.sockaddr import Sockaddr
from graft.swap.call_log import line
from graft.swap.decision import Action, Call, Decision
from graft.swap.supervisor import LogEntry

WEB = Sockaddr(4, bytes(16), 80)
ENDPOINTS = {5: parse_endpoint("nx4", "0.0.0.0:8080")}


def said(call: Call, address: Sockaddr | None, decision: Decision, error: int = 0) -> str:
    return line(LogEntry(call, address, decision, error), ENDPOINTS)


def test_a_bind_that_became_an_endpoint() -> None:
    assert said(Call.BIND, WEB, Decision(Action.TO_HOST, 5)) == "graft: bind 0.0.0.0:80 -> nx4 = 0.0.0.0:8080"


def test_a_connect_names_where_it_leaves_from() -> None:
    assert said(Call.CONNECT, WEB, Decision(Action.TO_HOST, 5)) == "graft: connect 0.0.0.0:80 from nx4 = 0.0.0.0:8080"


def test_an_endpoint_that_is_gone_is_named_by_its_number() -> None:
    assert said(Call.BIND, WEB, Decision(Action.TO_HOST, 6)) == "graft: bind 0.0.0.0:80 -> endpoint 6"


def test_a_refusal_and_a_failure_are_named_by_their_errno() -> None:
    assert said(Call.BIND, WEB, Decision(Action.REFUSE, error=errno.EACCES)) == "graft: bind 0.0.0.0:80: EACCES"
    taken = said(Call.BIND, WEB, Decision(Action.TO_HOST, 5), errno.EADDRINUSE)
    assert taken == "graft: bind 0.0.0.0:80: EADDRINUSE"


def test_a_call_that_was_left_alone_gets_a_line_too() -> None:
    assert said(Call.LISTEN, None, Decision(Action.RESUME)) == "graft: listen: left as it is"
    assert said(Call.BIND, WEB, Decision(Action.TO_CONTAINER)) == "graft: bind 0.0.0.0:80: back to the container"
