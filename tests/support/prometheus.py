"""A real Prometheus, Debian's, that scrapes one address, and its API."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.installation import Host

_CONFIG = """
global:
  scrape_interval: 2s
  scrape_timeout: 2s
scrape_configs:
  - job_name: graft
    static_configs:
      - targets: ["{target}"]
"""


@dataclass(frozen=True, slots=True)
class Prometheus:
    """It listens at a loopback port of the host's namespace."""

    host: Host
    port: int

    def _get(self, path: str, **query: str) -> Any:
        text = self.host.netns.fetch("127.0.0.1", self.port, f"{path}?{urllib.parse.urlencode(query)}")
        answer = json.loads(text)
        assert answer["status"] == "success", f"{query}: {answer}"
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now. Fails the test for an error in it."""
        return list(self._get("/api/v1/query", query=expression)["result"])

    def value(self, expression: str) -> float | None:
        """The only series' value; None where there is none."""
        found = self.query(expression)
        assert len(found) < 2, f"{expression}: {found}"
        return float(found[0]["value"][1]) if found else None

    def target(self) -> dict[str, Any]:
        """What it says of the only address that it scrapes."""
        [found] = self._get("/api/v1/targets")["activeTargets"]
        return dict(found)


@contextmanager
def prometheus(host: Host, folder: Path, target: str) -> Iterator[Prometheus]:
    """One in the host's namespace that scrapes ``target`` (ADDR:PORT) each two seconds; its files are in ``folder``."""
    config = folder / "prometheus.yaml"
    config.write_text(_CONFIG.format(target=target))
    made = Prometheus(host, host.port())
    program = host.start_command(
        host.netns.command(
            "/usr/bin/prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{made.port}",
        )
    )
    program.until("Prometheus listens", lambda: host.netns.listens(made.port), timeout=60)
    program.until("it is ready", lambda: "Ready" in host.netns.fetch("127.0.0.1", made.port, "/-/ready"), timeout=60)
    program.until("it has scraped", lambda: made.value("graft_up") is not None, timeout=60)
    yield made
    program.stop()
