"""What the twenty-fourth reading found: a bpffs that everybody can write; a container that is held in its start while
the operator applies another policy; endpoints that one kept, or kept others from, by having asked for them; policies
where others can write; a watcher of decisions that forgets nobody.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graft.commands.trace import _GONE, _Names
from graft.errors import RefusedError
from graft.oci.options import RuntimeOptions
from graft.oci.request import Request, Source, choose_policy
from tests.e2e.conftest import _docker, _podman, container_root, docker, podman
from tests.hostile.test_eighth_reading_folders import holder, running
from tests.hostile.test_twenty_third_reading import GRAFTS, image, is_attached, policies
from tests.support.cgroups import new_cgroup
from tests.support.engines import Engine
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4
from tests.support.puppet import puppet
from tests.support.shell import Result, run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

__all__ = ["_docker", "_podman", "container_root", "docker", "podman"]

# ---- a bpffs that everybody can write, as the kernel makes it

AS_NOBODY = "import os, sys; os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
EVERYBODYS = 'mount -t bpf bpf /sys/fs/bpf && test "$(stat -c %a /sys/fs/bpf)" = 1777; '


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """A folder with files of root's."""
    folder = tmp_path / "roots"
    folder.mkdir(mode=0o700)
    for name in ("passwd", "shadow"):
        (folder / name).write_text("precious")
    return folder


def beside_an_attacker(host: Host, attack: str, *commands: str) -> Result:
    """Shell commands where a user has done something to a bpffs that is everybody's; it is gone afterwards."""
    nobody = f"{sys.executable} -c '{AS_NOBODY}{attack}'; "
    words = ["unshare", "--mount", "--propagation=private", "sh", "-c", EVERYBODYS + nobody + "; ".join(commands)]
    return run(words, environment=host.environment)


@pytest.mark.parametrize("where", ["", "-new"])
def test_root_removes_nothing_by_a_link_of_somebodys(bare_host: Host, roots: Path, where: str) -> None:
    """Where there is no protection of links (fs.protected_symlinks), and it is not the last part of the path."""
    pins = bare_host.settings.pin_dir
    attack = f'os.symlink("{roots}", "{pins}{where}")'
    commands = ["echo 0 > /proc/sys/fs/protected_symlinks", f"{GRAFT} up", f"{GRAFT} down --force"]
    done = beside_an_attacker(bare_host, attack, *commands)
    assert sorted(os.listdir(roots)) == ["passwd", "shadow"]
    assert f"{pins}{where}: it is a symbolic link (look at it, and remove it)" in done.stderr


def test_a_folder_of_somebodys_is_told_and_bpffs_is_roots_from_then_on(bare_host: Host) -> None:
    pins = bare_host.settings.pin_dir
    commands = [f"{GRAFT} up", "stat -c %a /sys/fs/bpf", f"rm -r {pins}", f"{GRAFT} up", f"{GRAFT} ps; echo $?"]
    done = beside_an_attacker(bare_host, f'os.makedirs("{pins}/x")', *commands, f"{GRAFT} down --force")
    assert done.stdout.split() == ["700", "0"]
    assert f"{pins}: user 65534 owns it (look at it, and remove it)" in done.stderr


def test_doctor_says_that_everybody_can_write_bpffs_and_mends_it(bare_host: Host) -> None:
    commands = [f"{GRAFT} doctor", f"{GRAFT} doctor --fix", "stat -c mode:%a /sys/fs/bpf"]
    done = beside_an_attacker(bare_host, "", *commands)
    assert "bpffs: others can write it (graft doctor --fix, or chmod 700 /sys/fs/bpf)" in done.stderr
    assert "mode:700" in done.stdout


# ---- a container that is held in its start


@contextmanager
def held_in_its_start(host: Host, podman: Engine, folder: Path, variable: str) -> Iterator[subprocess.Popen[bytes]]:
    """`podman run` of a hostile image, whose volume somebody holds: crun waits there in its mounts. After the block it
    goes on.
    """
    one, two = folder / "volume", folder / "volume2"
    for path in (one, two):
        path.mkdir()
        path.chmod(0o777)
    for above in (folder, *folder.parents):
        if above != Path("/tmp") and above.is_relative_to("/tmp"):
            above.chmod(0o755)
    volumes = ["-v", f"{one}:/x", "-v", f"{two}:/x/sub"]
    words = [
        "run",
        "-d",
        "--name",
        "evil",
        "--network",
        "none",
        "-e",
        variable,
        *volumes,
        *podman.image,
        "sleep",
        "1000",
    ]
    with running(holder(one)):
        environment = {**os.environ, **podman.environment}
        starting = subprocess.Popen(podman.command(*words), env=environment, stdout=subprocess.DEVNULL)
        shims = host.settings.run_dir / "oci"
        until("its shim waits", lambda: any((shim / "hook").exists() for shim in shims.glob("*/")), 20)
        until("crun waits", lambda: waits_in_crun(starting), 20)
        yield starting
    starting.wait(60)


def waits_in_crun(starting: subprocess.Popen[bytes]) -> bool:
    """Whether a process below it is in the kernel, on its way through a folder."""
    assert starting.poll() is None
    below = run(["ps", "-eo", "pid=,ppid=,stat=,comm="]).stdout.splitlines()
    return any(line.split()[2].startswith("D") and "crun" in line for line in below)


def test_one_that_is_held_in_its_start_does_not_get_the_policy_of_before(
    host: Host, podman: Engine, tmp_path: Path
) -> None:
    file = policies(host) / "web.yaml"
    with host.client.listener(CLIENT4) as listener:
        port = listener.getsockname()[1]

        def write(ports: str) -> None:
            rule = f"{{to: {CLIENT4}, ports: {ports}, endpoint: out}}"
            file.write_text(
                f"name: web\nopen: true\nendpoints: {{out: 0.0.0.0:dynamic}}\negress: [{rule}]\ndefault: deny\n"
            )

        write(f"[1, {port}]")
        podman.started("there", ["-e", "GRAFT_POLICY=web"], "sleep", "1000")
        with held_in_its_start(host, podman, tmp_path, "GRAFT_POLICY=web") as starting:
            write("[1]")
            host.graft("policy", "apply", file)
        listed = host.installation.containers.listing()
        assert len(listed) == (2 if starting.returncode == 0 else 1)
        for one in listed:  # it may have read the file afterwards
            shown = host.graft("policy", "show", str(one.id)).stdout
            assert f"{CLIENT4}/32:1 " in shown and str(port) not in shown
    podman.remove("there", "evil")
    file.unlink()


def test_one_that_is_held_in_its_start_does_not_get_an_endpoint_that_is_not_open(
    host: Host, podman: Engine, tmp_path: Path
) -> None:
    host.graft("ep", "add", "front", f"127.0.0.1:{host.port()}", "--open")
    with held_in_its_start(host, podman, tmp_path, "GRAFT_CONV_PAIRS=0.0.0.0:81=front") as starting:
        host.graft("ep", "del", "front")
        host.graft("ep", "add", "front", f"0.0.0.0:{host.port()}")  # for others
    assert starting.returncode != 0
    assert host.installation.containers.listing() == []
    podman.remove("evil")


# ---- endpoints that containers have asked for


def shop_policy(address: str, port: int, extra: str = "") -> str:
    return (
        f"name: shop\n{extra}endpoints:\n  front: {{address: '{address}:{port}', open: true}}\n"
        "ingress: [{bind: '0.0.0.0:80', endpoint: front}]\ndefault: deny\n"
    )


@pytest.mark.parametrize("how", ["attach", "watcher"])
def test_who_asked_does_not_keep_an_endpoint_that_is_declared_anew(
    host: Host, docker: Engine, tmp_path: Path, how: str
) -> None:
    saving, file, port = host.saving, tmp_path / "shop.yaml", host.port()
    wanted = image(docker, f"keeper-{how}", "GRAFT_CONV_PAIRS=0.0.0.0:81=front")
    with new_cgroup("shop") as shop:
        file.write_text(shop_policy("0.0.0.0", port))
        saving.graft("attach", "--cgroup", shop, "--policy", file)
        docker("run", "-d", "--name", "keeper", *docker.run_flags, *GRAFTS, wanted, "sleep", "1000")
        file.write_text(shop_policy("127.0.0.1", port))
        if how == "attach":
            saving.graft("detach", "--cgroup", shop)
            saving.graft("attach", "--cgroup", shop, "--policy", file)
        else:  # the service is not running just now; the operator narrows its policy; it starts
            shop.rmdir()
            until("it has ended", lambda: not is_attached(saving, shop))
            saving.graft("policy", "apply", file)
            shop.mkdir()
            until("it is attached", lambda: is_attached(saving, shop), 40)
        docker("exec", "-d", "keeper", "nc", "-l", "-p", "81")
        shows = ("exec", "keeper", "busybox", "netstat", "-ltn")
        until("it listens, inside", lambda: ":81 " in docker(*shows, status=None).stdout)
        assert not host.netns.listens(port)
        with puppet(shop, host.netns.path) as one:
            assert one.bind("0.0.0.0", 80) == "ok"
        saving.graft("detach", "--cgroup", shop, status=None)
    docker("rm", "-f", "keeper")
    graft = host.installation
    until("it has ended", lambda: not graft.containers.listing(), 10)
    assert {int(key.value) for key in graft.maps.endpoints.keys()} == {one.id for one in graft.endpoints.listing()}  # noqa: SIM118
    host.graft("down", "--force", "--forget", status=None)
    host.graft("up")


def test_who_asked_keeps_no_other_that_asked_from_a_narrower_policy(host: Host, docker: Engine) -> None:
    file, port = policies(host) / "shop.yaml", host.port()
    file.write_text(shop_policy("0.0.0.0", port, "open: true\n"))
    good, evil = image(docker, "good", "GRAFT_POLICY=shop"), image(docker, "evil", "GRAFT_CONV_PAIRS=0.0.0.0:81=front")
    for name, wanted in (("good", good), ("evil", evil)):
        docker("run", "-d", "--name", name, *docker.run_flags, *GRAFTS, wanted, "sleep", "1000")
    file.write_text(shop_policy("127.0.0.1", port, "open: true\n"))
    host.graft("policy", "apply", file)
    [asked] = [one for one in host.installation.containers.listing() if one.origin == "asked"]
    assert "127.0.0.1" in host.graft("policy", "show", asked.id).stdout
    docker("rm", "-f", "good", "evil")
    file.unlink()


@pytest.mark.parametrize("address", ["'[::1]:{}'", "'127.0.0.1:{}-{}'"], ids=["family", "ports"])
def test_who_asked_keeps_the_operator_from_no_import_and_no_change(
    host: Host, docker: Engine, tmp_path: Path, address: str
) -> None:
    saving, port = host.saving, host.ports(2)
    saving.graft("ep", "add", "front", f"0.0.0.0:{port}", "--open")
    saving.graft("ep", "add", "out", "0.0.0.0:dynamic")
    evil = image(docker, "evil", "GRAFT_CONV_PAIRS=0.0.0.0:81=front")
    with new_cgroup("one") as one:
        (tmp_path / "p.yaml").write_text("name: p\negress: [{to: 127.0.0.0/8, endpoint: out}]\ndefault: deny\n")
        saving.graft("attach", "--cgroup", one, "--policy", tmp_path / "p.yaml")
        docker("run", "-d", "--name", "evil", *docker.run_flags, *GRAFTS, evil, "sleep", "1000")
        before = saving.installation.endpoints.listing()
        endpoints = f"endpoints:\n  front: {address.format(port, port + 1)}\n  out: '[::]:dynamic'\n"
        (tmp_path / "fails.yaml").write_text(f"version: 1\nattachments: []\n{endpoints}")
        assert "use 'out' as an IPv4 endpoint" in saving.graft("import", tmp_path / "fails.yaml", status=4).stderr
        assert saving.installation.endpoints.listing() == before  # those that asked lost nothing either
        text = saving.graft("export").stdout.replace("127.0.0.0/8", "127.0.0.1/32")
        (tmp_path / "all.yaml").write_text(text.replace(f"0.0.0.0:{port}", address.format(port, port + 1)))
        said = saving.graft("import", tmp_path / "all.yaml").stderr
        assert "has asked for front, which is another endpoint now" in said
        assert "127.0.0.1/32" in saving.graft("policy", "show", one).stdout
        saving.graft("ep", "set", "front", f"127.0.0.3:{port}")
        docker("rm", "-f", "evil")
        saving.graft("detach", "--cgroup", one, status=None)
    saving.graft("down", "--force", "--forget", status=None)
    saving.graft("up")


# ---- policies where others can write


@pytest.mark.parametrize("what", ["state", "policies", "file"])
def test_a_policy_that_others_may_have_written_is_not_granted(host: Host, tmp_path: Path, what: str) -> None:
    settings = host.settings._replace(state_dir=tmp_path / "state")
    folder = settings.state_dir / "policies"
    folder.mkdir(parents=True, mode=0o700)
    file = folder / "evil.yaml"
    file.write_text("name: evil\nopen: true\n")
    asked = Request(Source.POLICY, "evil")
    assert choose_policy(settings, asked, {}, RuntimeOptions(), {}).name == "evil"
    {"state": settings.state_dir, "policies": folder, "file": file}[what].chmod(0o777)
    with pytest.raises(RefusedError, match="others can write it"):
        choose_policy(settings, asked, {}, RuntimeOptions(), {})


def test_doctor_does_not_hide_that_others_could_write_policies(bare_host: Host) -> None:
    host = bare_host.saving
    folder = host.settings.state_dir
    (folder / "policies").mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)
    try:
        assert "look at what is there" in host.graft("doctor", "--fix", status=1).stderr
        assert folder.stat().st_mode & 0o777 == 0o777
    finally:
        folder.chmod(0o700)


# ---- who watches


def test_graft_trace_forgets_containers_that_have_ended(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _Names(host.installation)
    monkeypatch.setattr("graft.commands.trace._GONE", 3)
    assert _GONE > 3
    for _ in range(6):
        with new_cgroup("short") as path:
            host.graft("attach", "--cgroup", path)
            names._looked = -10.0
            names._refresh()
            host.remove_at(path)
    names._looked = -10.0
    names._refresh()
    assert len(names._containers) == 3
