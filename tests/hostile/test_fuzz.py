"""Random sequences of socket calls, with a judge that shares no code with Graft (tests/fuzz)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import fuzz, replay
from tests.fuzz.arena import arena
from tests.fuzz.generate import generate
from tests.fuzz.model import TRANSPORTS, Sequence, Transport
from tests.fuzz.run import runner
from tests.hostile.conftest import Without
from tests.support.building import Programs
from tests.support.installation import Host

SEQUENCES: dict[Transport, int] = {"swap": 250, "born": 300, "direct": 400, "splice": 30}
"""The same ones in every run, on a fast machine and on a slow one: twenty seconds each. `make fuzz` takes others."""
SECONDS = 120
FOLDER = Path(__file__).resolve().parents[1] / "fuzz/kept"
KEPT = {file.stem: Sequence.from_json(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}
CONTROLS = [name for name, one in KEPT.items() if one.defence]

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(SECONDS + 260)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_happens_that_no_policy_grants(
    host: Host, programs: Programs, tmp_path: Path, transport: Transport
) -> None:
    tally = fuzz(host, programs, tmp_path, transport, SECONDS, seed=1, most=SEQUENCES[transport])
    assert not tally.failed, f"build/fuzz has what failed: {tally}"
    needed = ["bind", "listen", "connect", *(["send"] if transport in ("direct", "born") else [])]
    assert [name for name in needed if not tally.granted[name]] == [], f"never granted: {tally}"
    assert tally.refused["bind"] and tally.refused["connect"] and tally.changes, f"nothing was refused: {tally}"


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_sequence_has_no_findings(
    host: Host, programs: Programs, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    if KEPT[name].known:
        request.applymarker(pytest.mark.xfail(strict=True, reason=KEPT[name].known))
    assert replay(host, programs, tmp_path, KEPT[name]) == []


@pytest.mark.parametrize("name", CONTROLS)
def test_control_without_its_defence_a_kept_sequence_has_findings(
    without: Without, programs: Programs, tmp_path: Path, name: str
) -> None:
    assert replay(without(KEPT[name].defence), programs, tmp_path, KEPT[name])


def test_control_without_the_packet_hook_generated_sequences_have_findings(
    without: Without, programs: Programs, tmp_path: Path
) -> None:
    host = without("packets in")
    first = generate(1, "direct")
    with arena(host, "direct", first.world, programs, tmp_path) as made, runner(made) as running:
        assert any(running.run(generate(seed, "direct")) for seed in range(1, 61))
