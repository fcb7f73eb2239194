"""What the Debian package is made of: one version, manual pages and completion from the commands themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import graft

ROOT = Path(__file__).resolve().parents[2]
MANUAL = [sys.executable, "-m", "graft_cli.manual"]
UNESCAPED = re.compile(r"(?<!\\)-")


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages."""
    folder = tmp_path_factory.mktemp("man")
    subprocess.run([*MANUAL, folder], check=True)
    return folder


def complete(shell: str, **environment: str) -> str:
    """What `graft` prints for a shell that completes."""
    program = "from graft_cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "_GRAFT_COMPLETE": shell, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_package_has_grafts_version() -> None:
    first = (ROOT / "debian" / "changelog").read_text().splitlines()[0]
    assert first.startswith(f"graft ({graft.__version__}) ")


def test_each_command_has_a_page(manual: Path) -> None:
    pages = {page.stem for page in manual.iterdir()}
    assert {"graft", "graft-run", "graft-ep", "graft-ep-add", "graft-policy-apply", "graft-import"} <= pages
    overview = (manual / "graft.8").read_text().replace("\\", "")
    assert all(f".B {page.replace('-', ' ', 1)}" in overview for page in pages - {"graft"} if page.count("-") == 1)


def test_a_page_says_what_help_says(manual: Path) -> None:
    page = (manual / "graft-run.8").read_text().replace("\\", "")
    assert ".SH NAME\ngraft-run - " in page
    assert ".B graft run\n[OPTIONS]" in page
    assert "-i ADDR:PORT" in page and "--deny" in page


def test_no_page_has_a_line_that_roff_takes_for_its_own(manual: Path) -> None:
    known = {".TH", ".SH", ".B", ".PP", ".TP", ".BR"}
    for page in manual.iterdir():
        lines = page.read_text().splitlines()
        assert {line.split()[0] for line in lines if line.startswith((".", "'"))} <= known
        assert not [line for line in lines if UNESCAPED.search(line)]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_completion_for_each_shell(shell: str) -> None:
    assert "_GRAFT_COMPLETE" in complete(f"source_{shell}")


def test_bash_completes_commands_and_options() -> None:
    words = {"COMP_WORDS": "graft ep ", "COMP_CWORD": "2"}
    assert complete("complete_bash", **words).split() == ["add", "set", "del", "show"]
    words = {"COMP_WORDS": "graft run --de", "COMP_CWORD": "2"}
    assert complete("complete_bash", **words).split() == ["--deny"]
