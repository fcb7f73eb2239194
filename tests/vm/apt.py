"""apt with a configuration of its own: kernels of other suites, listed and downloaded, nothing installed here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

_SUITES = ("bullseye", "bookworm", "bookworm-backports", "trixie", "trixie-backports")
_SECURITY = ("bullseye-security", "bookworm-security", "trixie-security")
_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_FOLDERS = (
    "etc/apt.conf.d",
    "etc/preferences.d",
    "etc/sources.list.d",
    "state/lists/partial",
    "cache/archives/partial",
)


class AptError(Exception):
    """apt could not do it; the text says what."""


def mirror() -> str:
    """Where this machine gets its packages from, as its own configuration says. Raises AptError."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for file in files:
        text = file.read_text() if file.is_file() else ""
        found = re.search(r"^(?:URIs:|deb(?:\s+\[[^]]*\])?)\s+(\S+/debian)/?\s*(?:$|\s)", text, re.M)
        if found:
            return found[1]
    raise AptError("no mirror of Debian's in /etc/apt: is this a Debian machine?")


class Apt:
    """The configuration below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._config = folder / "apt.conf"
        for name in _FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        source, security = mirror(), f"{mirror()}-security"
        lines = [f"deb [signed-by={_KEYS}] {source} {suite} main" for suite in _SUITES]
        lines += [f"deb [signed-by={_KEYS}] {security} {suite} main" for suite in _SECURITY]
        (folder / "etc/sources.list").write_text("\n".join(lines) + "\n")
        self._config.write_text(
            f'Dir::Etc "{folder}/etc";\nDir::State "{folder}/state";\nDir::Cache "{folder}/cache";\n'
            'Dir::State::status "/var/lib/dpkg/status";\nAcquire::Languages "none";\nAPT::Sandbox::User "root";\n'
        )

    def _run(self, *words: str, folder: Path | None = None, check: bool = True) -> str:
        environment = {**os.environ, "APT_CONFIG": str(self._config), "LC_ALL": "C"}
        done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)
        if check and done.returncode != 0:
            raise AptError((done.stderr or done.stdout).strip().splitlines()[-1])
        return done.stdout

    def update(self) -> None:
        """Fetch the lists. A suite that is not there any more is no failure: what it had is not listed then."""
        self._run("apt-get", "update", "-qq", check=False)

    def kernel_packages(self) -> list[str]:
        """The names of all packages that may belong to a kernel."""
        found = self._run("apt-cache", "search", "--names-only", "^linux-(image|binary|modules)-[0-9].*-cloud-amd64$")
        return [line.split()[0] for line in found.splitlines()]

    def download(self, package: str, folder: Path) -> Path:
        """The package's file in ``folder``, where it is kept. Raises AptError."""
        kept = sorted(folder.glob(f"{package}_*.deb"))
        if not kept:
            self._run("apt-get", "download", "-qq", package, folder=folder)
            kept = sorted(folder.glob(f"{package}_*.deb"))
        return kept[-1]
