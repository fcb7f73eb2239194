"""The dashboard of examples/grafana: each of its queries gives series, asked of a real Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_metrics import SCRAPE, serve
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4
from tests.support.plain import plain
from tests.support.prometheus import Prometheus, prometheus
from tests.support.relayed import pair, published, talk
from tests.support.wait import until

pytestmark = pytest.mark.e2e

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "graft.json"
VARIABLES = {"$__rate_interval": "30s", "$container": ".*"}
"""What Grafana puts in the place of each, with all containers chosen."""


def values_of(found: Any, key: str) -> Iterator[str]:
    """Every value of that key, however deep."""
    if isinstance(found, dict):
        for name, one in found.items():
            if name == key:
                yield one
            yield from values_of(one, key)
    elif isinstance(found, list):
        for one in found:
            yield from values_of(one, key)


def filled(expression: str) -> str:
    """An expression as Grafana sends it."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def test_every_query_of_the_dashboard_gives_series(host: Host, tmp_path: Path) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [filled(one) for one in values_of(dashboard["panels"], "expr")]
    assert len(expressions) > 10
    port = host.port()
    serve(host, f"127.0.0.1:{port}")
    with plain(host) as container, container.listener() as listener:
        client, accepted = pair(container, listener, published(container))
        with client, accepted, host.client.listener(CLIENT4) as world, container.tcp() as program:
            talk(client, accepted)
            program.connect(world.getsockname())
            # graftd's own sockets are not the container's; a program under `graft run` has some.
            endpoint = host.endpoint(f"0.0.0.0:{host.port()}")
            host.start("-i", f"0.0.0.0:80={endpoint}", "--", "socat", "TCP-LISTEN:80,fork", "PIPE")
            with prometheus(host, tmp_path, f"127.0.0.1:{port}") as asked:
                for expression in expressions:
                    until(expression, lambda: asked.query(expression), SCRAPE)  # noqa: B023
                names(asked, dashboard)


def names(asked: Prometheus, dashboard: Any) -> None:
    """The variable `container` of the dashboard lists what Prometheus has."""
    [query] = [one["definition"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
    assert found is not None
    assert all(one["metric"][found[2]] for one in asked.query(found[1]))
    assert asked.query(found[1])


def test_every_panel_asks_the_data_source_that_is_chosen() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    sources = {json.dumps(one, sort_keys=True) for one in values_of(dashboard, "datasource")}
    assert sources == {'{"type": "prometheus", "uid": "${datasource}"}'}
    numbers = list(values_of(dashboard["panels"], "id"))
    assert len({one for one in numbers if isinstance(one, int)}) == len(dashboard["panels"])
