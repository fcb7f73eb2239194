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
    "etc",
    "state/lists/partial",
    "cache/archives/partial",
)


class AptError(Exception):
    """apt could not do it; the text says what."""


def read_sources() -> str:
    """This machine's own list of sources, both formats, and the lists of mirrors that it names."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    text = "\n".join(file.read_text() for file in files if file.suffix in (".list", ".sources") and file.is_file())
    lists = [Path(path) for path in re.findall(r"mirror\+file:(?://)?(/\S+)", text)]  # as Debian's cloud images have
    return "\n".join([text, *(f"URIs: {file.read_text()}" for file in lists if file.is_file())])


def archive(sources: str, name: str) -> str | None:
    """The address of Debian's archive ``name`` (debian, debian-security) in a list of sources."""
    found = re.search(rf"^(?:URIs:|deb(?:\s+\[[^]]*\])?)\s+(https?://\S+/{name})/?(?=\s|$)", sources, re.M)
    return found[1] if found else None


def mirror() -> str:
    """Where this machine gets its packages from, as its own configuration says. Raises AptError."""
    found = archive(read_sources(), "debian")
    if found is None:
        raise AptError("no mirror of Debian's in /etc/apt: is this a Debian machine?")
    return found


def security() -> str:
    """The same for its security updates: a mirror of its own, or the one that a mirror has beside it."""
    return archive(read_sources(), "debian-security") or f"{mirror()}-security"


class Apt:
    """The configuration below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._config = folder / "apt.conf"
        for name in _FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        source, updates = mirror(), security()
        lines = [f"deb [signed-by={_KEYS}] {source} {suite} main" for suite in _SUITES]
        lines += [f"deb [signed-by={_KEYS}] {updates} {suite} main" for suite in _SECURITY]
        (folder / "etc/sources.list").write_text("\n".join(lines) + "\n")
        self._config.write_text(
            # Only the sources are others: a proxy or a certificate that this machine's apt needs is needed here too.
            f'Dir::Etc::sourcelist "{folder}/etc/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
            'Dir::Etc::preferences "/dev/null";\nDir::Etc::preferencesparts "/dev/null";\n'
            f'Dir::State "{folder}/state";\nDir::Cache "{folder}/cache";\n'
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
        names = [line.split()[0] for line in found.splitlines()]
        if not names:
            raise AptError("apt lists no kernel at all: can this machine reach its mirror?")
        return names

    def download(self, package: str, folder: Path) -> Path:
        """The package's file in ``folder``, where it is kept. Raises AptError."""
        kept = sorted(folder.glob(f"{package}_*.deb"))
        if not kept:
            self._run("apt-get", "download", "-qq", package, folder=folder)
            kept = sorted(folder.glob(f"{package}_*.deb"))
        return kept[-1]
