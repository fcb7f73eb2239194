"""`graft runtime install`: what it does with the file, and what becomes of it when the engine refuses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft.errors import ConflictError, GraftError, UsageError
from graft.oci.engine_config import ByHandError
from graft.oci.engine_install import Done, install, uninstall

CONTAINERD = 'version = 3\nimports = ["conf.d/*.toml"]\n'


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return executable(tmp_path / "graft-runtime", "")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "etc" / "config"


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for stand-ins of engines: no real one is on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "env", "cat"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def dockerd(folder: Path, script: str) -> None:
    executable(folder / "dockerd", f'case $1 in --help) echo "--validate";; --validate) {script};; esac')


def test_a_file_keeps_its_mode_and_the_link_to_it(config: Path, program: Path, engines: Path, tmp_path: Path) -> None:
    config.parent.mkdir()
    target = tmp_path / "managed"
    target.write_text('{"debug": true}')
    target.chmod(0o600)
    config.symlink_to(target)
    done = install("docker", config, program)
    assert done.change.path == target and config.is_symlink()
    assert target.stat().st_mode & 0o7777 == 0o600
    assert target.read_text() == f'{{"debug": true, "runtimes": {{"graft": {{"path": "{program}"}}}}}}'
    uninstall("docker", config)
    assert target.read_text() == '{"debug": true}'


@pytest.mark.parametrize("engine", ["docker", "podman", "containerd"])
def test_the_second_time_nothing_is_done_and_uninstall_leaves_no_file(
    engine: str, config: Path, program: Path, engines: Path
) -> None:
    if engine == "containerd":
        config.parent.mkdir()
        config.write_text(CONTAINERD)
    first = install(engine, config, program)
    assert first.change.is_needed and first.unchecked.endswith("is not installed") and first.reload
    written = first.change.path
    before = written.stat()
    assert not install(engine, config, program).change.is_needed
    assert written.stat() == before
    assert uninstall(engine, config).change.is_needed
    assert not written.exists()
    assert not uninstall(engine, config).change.is_needed
    assert engine != "containerd" or config.read_text() == CONTAINERD


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_a_dry_run_writes_nothing_and_shows_what_would_change(engine: str, config: Path, program: Path) -> None:
    done = install(engine, config, program, dry_run=True)
    assert done.change.diff()[:2] == ["--- /dev/null", f"+++ {config}"]
    assert not config.parent.exists()


@pytest.mark.parametrize("before", [None, '{"log-level": "no such"}\n'])
def test_what_dockerd_refuses_is_put_back(before: str | None, config: Path, program: Path, engines: Path) -> None:
    dockerd(engines, 'echo "level=info" >&2; echo "log-level: no" >&2; exit 1')
    if before is not None:
        config.parent.mkdir()
        config.write_text(before)
        config.chmod(0o640)
    with pytest.raises(GraftError, match=f"{config} is put back as it was: dockerd refuses it: log-level: no"):
        install("docker", config, program)
    assert (config.read_text() if config.exists() else None) == before
    assert before is None or config.stat().st_mode & 0o7777 == 0o640
    assert not list(config.parent.glob(".*"))


def test_dockerd_checks_the_very_file(config: Path, program: Path, engines: Path) -> None:
    dockerd(engines, 'cat "$3" >"$3.seen"')
    done: Done = install("docker", config, program)
    assert done.checked_by == "dockerd --validate"
    assert config.with_name("config.seen").read_text() == config.read_text()


def test_a_dockerd_without_a_check_is_said(config: Path, program: Path, engines: Path) -> None:
    executable(engines / "dockerd", "exit 0")
    assert install("docker", config, program).unchecked == "this dockerd has no --validate"


def test_podman_has_to_find_this_program_by_the_name(config: Path, program: Path, engines: Path) -> None:
    executable(engines / "podman", "echo /other/graft-runtime")
    with pytest.raises(GraftError, match="podman says that the runtime graft is '/other/graft-runtime'"):
        install("podman", config, program)
    assert not config.exists()
    executable(engines / "podman", f'[ "$CONTAINERS_CONF" = {config} ] && echo {program}')
    assert install("podman", config, program).checked_by == "podman --runtime graft info"


def dump(program: Path, root: str) -> str:
    """What a containerd 2.x does for `config dump`: with the runtime, and another ``root``, where Graft's file is."""
    table = "plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes"
    runc = f"[{table}.runc]\nruntime_type = 'io.containerd.runc.v2'"
    ours = f"[{table}.graft.options]\nBinaryName = '{program}'"
    text = f'[ -e conf.d/graft.toml ] || root=/x\ncat <<END\nroot = "${{root:-{root}}}"\n{runc}\nEND\n'
    return f"{text}[ ! -e conf.d/graft.toml ] || cat <<END\n{ours}\nEND"


def test_containerd_has_to_keep_all_that_it_had(
    config: Path, program: Path, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.parent.mkdir()
    config.write_text(CONTAINERD)
    monkeypatch.chdir(config.parent)
    executable(engines / "containerd", dump(program, "/y"))
    with pytest.raises(ByHandError, match="would forget the rest"):
        install("containerd", config, program)
    drop_in = config.parent / "conf.d" / "graft.toml"
    assert not drop_in.exists()
    executable(engines / "containerd", dump(program, "/x"))
    assert install("containerd", config, program).checked_by == "containerd config dump"
    assert str(program) in drop_in.read_text()


def test_a_file_of_somebody_else_in_containerds_folder_stays(config: Path, program: Path, engines: Path) -> None:
    drop_in = config.parent / "conf.d" / "graft.toml"
    drop_in.parent.mkdir(parents=True)
    config.write_text(CONTAINERD)
    drop_in.write_text("version = 3\n")
    with pytest.raises(ConflictError, match="Graft did not write it"):
        install("containerd", config, program)
    with pytest.raises(ConflictError, match="Graft did not write it"):
        uninstall("containerd", config)
    assert drop_in.read_text() == "version = 3\n"


def test_what_is_no_file_or_no_text_is_refused_by_its_name(tmp_path: Path, program: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big").write_text("x" * (1 << 20) + "x")
    for name, said in (
        ("latin", "byte 7: not UTF-8"),
        ("pipe", "is not a regular file"),
        ("big", "too big"),
        (".", "cannot be read: Is a directory"),
    ):
        with pytest.raises(UsageError) as caught:
            install("docker", tmp_path / name, program)
        assert caught.value.message == f"{(tmp_path / name)}: {said}"


@pytest.mark.parametrize("name", ["none/graft-runtime", "other", "graft-runtime-not-executable/graft-runtime"])
def test_a_program_that_an_engine_could_not_run_is_refused(name: str, tmp_path: Path, config: Path) -> None:
    executable(tmp_path / "other", "")
    (tmp_path / "graft-runtime-not-executable").mkdir()
    (tmp_path / "graft-runtime-not-executable" / "graft-runtime").write_text("")
    with pytest.raises(UsageError, match=r"^--program: "):
        install("docker", config, tmp_path / name)


def graft(*words: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from graft_cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, "runtime", *map(str, words)], capture_output=True, text=True)


def test_the_command_shows_a_dry_run_without_root_and_names_an_unknown_engine(config: Path, program: Path) -> None:
    done = graft("install", "docker", "--dry-run", "--config", config, "--program", program)
    assert done.returncode == 0, done.stderr
    assert f'+            "path": "{program}"' in done.stdout.splitlines()
    refused = graft("install", "lxc", "--dry-run", "--program", program)
    assert (refused.returncode, refused.stderr) == (
        2,
        "graft: ENGINE: 'lxc' is not an engine (docker, podman, containerd)\n",
    )


def test_every_other_word_is_the_runtimes_own(tmp_path: Path) -> None:
    real = executable(tmp_path / "real", 'echo "$@"')
    code = "from graft_cli.main import main; main()"
    for words in (["--root", "/x", "list", "--help"], ["features"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "runtime", *words],
            env={**os.environ, "GRAFT_RUNTIME": str(real)},
            capture_output=True,
            text=True,
        )
        assert done.stdout == " ".join(words) + "\n", done.stderr
