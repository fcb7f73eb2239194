"""What happens to the containers of a soak, one thing after another, by a seed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence

from graft.splice import control
from tests.soak.containers import Box, SpliceBox
from tests.soak.excuses import Failure
from tests.support.installation import Host
from tests.support.wait import kill, until


class Events:
    """Each `happen` does one thing, and waits until what has to come back is there."""

    def __init__(self, host: Host, boxes: Sequence[Box], seed: int) -> None:
        self._host, self._boxes, self._random = host, boxes, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.log: list[tuple[float, float, str]] = []
        """When each began and ended (CLOCK_MONOTONIC), and what it was."""
        self._of = ""
        self._weights: dict[Callable[[], None], int] = {
            self._kill_supervisor: 4,
            self._kill_graftd: 3,
            self._kill_keeper: 2,
            self._kill_both: 1,
            self._stop_graftd: 1,
            self._replace_policy: 4,
            self._move_endpoint: 2,
            self._restart: 3,
        }

    def happen(self) -> str:
        """One of them, at random; gives its name."""
        event = self._random.choices([*self._weights], [*self._weights.values()])[0]
        name = event.__name__[1:].replace("_", " ")
        self._of, begun = "", time.monotonic()
        event()
        self.log.append((begun, time.monotonic(), f"{name} {self._of}".strip()))
        self.counts[name] += 1
        return name

    def _box(self, kinds: Sequence[str] = ()) -> Box:
        found = self._random.choice([box for box in self._boxes if not kinds or box.kind in kinds])
        self._of = found.name
        return found

    def near(self, failure: Failure) -> list[str]:
        """What happened during a failed request, or just before."""
        return [what for begun, ended, what in self.log if begun <= failure.ended and failure.begun - 2.0 <= ended]

    def _kill_supervisor(self) -> None:
        box = self._box(("swap", "born", "podman"))
        pid = box.supervisor()
        if pid:
            kill(pid)
            until(f"{box.name} has another supervisor", lambda: box.supervisor() not in (0, pid), 30)

    # ---- graftd and its keeper

    def _graftd(self) -> tuple[int, int]:
        """Their process ids, once both are there."""

        def both() -> tuple[int, int] | None:
            found = control.ask(self._host.settings, {"do": "ping"}) or {}
            return (found["pid"], found["keeper"]) if found.get("keeper") else None

        found = until("graftd and its keeper", both, 60)
        assert found is not None
        return found

    def _kill_graftd(self) -> None:
        begun = time.monotonic()
        pid, _ = self._graftd()
        kill(pid)
        until("another graftd", lambda: self._graftd()[0] != pid, 60)
        self._until_all_are_served()
        for box in self._boxes:
            if not box.survives_graftd:
                box.excuse(begun, "graftd was killed, and the kernel relays")
            elif isinstance(box, SpliceBox):
                box.excuse(begun, "graftd was killed in the moment when it accepted", rare=True)

    def _kill_keeper(self) -> None:
        pid, keeper = self._graftd()
        kill(keeper)
        until("another keeper", lambda: self._graftd()[1] != keeper, 60)
        assert self._graftd()[0] == pid

    def _kill_both(self) -> None:
        begun = time.monotonic()
        pid, keeper = self._graftd()
        os.kill(keeper, signal.SIGSTOP)  # it starts no other one
        kill(pid)
        kill(keeper)
        splice = [box for box in self._boxes if isinstance(box, SpliceBox)]
        splice[0].attach()
        self._until_all_are_served()
        for box in splice:
            box.excuse(begun, "graftd and its keeper were killed")

    def _stop_graftd(self) -> None:
        """For a moment, as a machine without memory does it."""
        pid, _ = self._graftd()
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(self._random.uniform(0.1, 2.0))
        finally:
            os.kill(pid, signal.SIGCONT)

    def _until_all_are_served(self) -> None:
        numbers = {box.container.container.id for box in self._boxes if isinstance(box, SpliceBox) and box.container}

        def all_served() -> bool:
            found = control.ask(self._host.settings, {"do": "ping"}) or {}
            return numbers <= set(found.get("containers", ()))

        until("all containers are served", all_served, 60)
        for box in self._boxes:
            if isinstance(box, SpliceBox):
                until(f"{box.name} is published", box.is_published, 60)

    # ---- the operator

    def _replace_policy(self) -> None:
        self._box().replace_policy()

    def _move_endpoint(self) -> None:
        box = self._box()
        begun = time.monotonic()
        if box.moves_at_once:
            box.move()
            until(f"{box.name} is published", box.is_published, 60)
        else:
            box.stop()
            box.move()
            box.start()
        box.excuse(begun, "its endpoint was moved")

    def _restart(self) -> None:
        box = self._box()
        begun = time.monotonic()
        box.restart()
        box.excuse(begun, "it was restarted")
