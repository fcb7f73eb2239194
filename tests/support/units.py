"""What a unit of systemd's may do, for a command without systemd."""

from __future__ import annotations

from pathlib import Path


def confined_as(unit: Path) -> tuple[str, ...]:
    """Words before a command that is to have no other capabilities than the unit in that file."""
    lines = [line for line in unit.read_text().splitlines() if line.startswith("CapabilityBoundingSet=")]
    names = [name.removeprefix("CAP_").lower() for line in lines for name in line.partition("=")[2].split()]
    only = ",".join(["-all", *(f"+{name}" for name in names)])
    return ("setpriv", f"--bounding-set={only}", "--inh-caps=-all", "--no-new-privs", "--")
