"""What the built package must and must not contain."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from graft.datapath.sources import bpf_source_dir

ROOT = Path(__file__).resolve().parents[2]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_below(folder: Path, name: str) -> set[str]:
    inits = [path.parent.relative_to(folder) for path in folder.rglob("__init__.py")]
    return {".".join((name, *relative.parts)) for relative in inits}


def test_every_package_of_the_checkout_is_in_the_list_of_pyproject() -> None:
    listed = set(project()["tool"]["setuptools"]["packages"]) - {"graft.bpf"}
    assert packages_below(ROOT / "graft", "graft") | packages_below(ROOT / "cli", "graft_cli") == listed


def test_no_package_takes_the_common_names_cli_or_bpf() -> None:
    assert {"graft", "graft_cli"} == {name.split(".")[0] for name in project()["tool"]["setuptools"]["packages"]}


def test_bcc_never_comes_from_the_python_index() -> None:
    table = project()["project"]
    extras = table["optional-dependencies"].values()
    requirements = [line for lines in (table["dependencies"], *extras) for line in lines]
    assert requirements
    assert not [line for line in requirements if line.startswith("bcc")]


def test_the_bpf_sources_are_found_with_their_header_tree() -> None:
    folder = bpf_source_dir()
    assert (folder / "graft.h").is_file()
    assert (folder / "include" / "linux" / "kconfig.h").is_file()
