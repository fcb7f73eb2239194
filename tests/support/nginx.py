"""nginx as the program of a container."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.support.installation import Host
from tests.support.program import Program

CONFIGURATION = """
daemon off; worker_processes {workers}; pid {folder}/pid; error_log stderr warn;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen {listen}; location / {{ {location} }} }}
}}
"""


def nginx(
    host: Host,
    folder: Path,
    rules: Sequence[str],
    listen: str,
    *,
    said: str = "",
    location: str = "",
    workers: int = 1,
) -> Program:
    """nginx under `graft run`, listening. It answers ``$server_port $server_addr $remote_addr`` and ``said``."""
    location = location or f"return 200 '$server_port $server_addr $remote_addr {said}\\n';"
    configuration = folder / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, workers=workers, listen=listen, location=location))
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    program = host.start(*rules, "--", "nginx", "-c", configuration)
    program.until("nginx is ready", lambda: (folder / "pid").exists() and (folder / "pid").read_text().strip())
    return program
