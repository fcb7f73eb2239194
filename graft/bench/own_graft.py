"""The installation of Graft that is measured: apart from the machine's own, and up from its first use to the end."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from graft.bench.process import BenchError, joined, run
from graft.bench.scratch import Scratch
from graft.model.settings import Settings

EGRESS = "bench-out"
"""The endpoint from which programs reach out."""


@dataclass
class OwnGraft:
    """An installation, whose commands run in the cgroup ``programs``."""

    settings: Settings
    programs: Path
    _used: bool = field(default=False, init=False)

    @classmethod
    @contextmanager
    def apart(cls, scratch: Scratch, host: Path, programs: Path) -> Iterator[OwnGraft]:
        """One whose host is the namespace ``host``. Taken down when the block ends, if anything used it."""
        settings = Settings(
            host_netns=host,
            pin_dir=scratch.pins,
            run_dir=scratch.folder / "run",
            state_dir=scratch.folder / "state",
            cache_dir=Settings.from_environment().cache_dir,
            cgroup=f"{scratch.name}/graft",
        )
        own = cls(settings, programs)
        try:
            yield own
        except BaseException:
            with suppress(BenchError):  # the first error is the one to show
                own._take_down()
            raise
        own._take_down()

    def _take_down(self) -> None:
        if self._used:
            self.run("down", "--force")

    def command(self, *arguments: str) -> list[str]:
        """`graft` with ``arguments``, to be run with the `environment`."""
        return joined(self.programs, [graft_command(), *arguments])

    @property
    def environment(self) -> Mapping[str, str]:
        """For commands. Nothing is saved: it would be restored by nobody."""
        return {**os.environ, **self.settings.environment, "GRAFT_NO_SAVE": "1"}

    def ensure_up(self) -> None:
        """Bring it up, with an endpoint to reach out from, unless it is up. Raises BenchError."""
        if not self._used:
            self._used = True
            self.run("ep", "add", EGRESS, "0.0.0.0:dynamic")

    def run(self, *arguments: str) -> str:
        """Run `graft` with ``arguments`` to its end. Raises BenchError."""
        return run(self.command(*arguments), environment=self.environment)


def graft_command() -> str:
    """The `graft` that belongs to this interpreter. Raises BenchError where there is none."""
    beside = Path(sys.prefix) / "bin" / "graft"
    found = str(beside) if beside.exists() else shutil.which("graft")
    if found is None:
        raise BenchError("the command graft is not on PATH")
    return found
