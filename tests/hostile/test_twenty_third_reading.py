"""What the twenty-third reading found: a container that ends, or starts, while a policy is replaced kept the one
before; one that had asked for its policy got the operator's by its name, and kept the operator from narrower ones; one
with very many sockets took the metrics of all; and names in what `graft policy learn` proposes.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from graft.commands import policy_apply, transfer
from graft.commands import saving as saving_module
from graft.kernel import cgroup
from graft.policy.reader import load_policy
from graft.saved.store import Store
from graft.saved.text import import_text
from graft.state import socket_counts
from graft.state.inventory import host_stack
from tests.e2e.conftest import _docker, container_root, docker
from tests.hostile.test_twenty_first_reading import policy
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.engines import IMAGE, Engine
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.puppet import puppet
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

__all__ = ["_docker", "container_root", "docker"]


@pytest.fixture
def paths(host: Host) -> Iterator[list[Path]]:
    with new_cgroup("one") as one, new_cgroup("two") as two:
        yield [one, two]
        host.graft("down", "--force", "--forget", status=None)
        host.graft("up")


# ---- containers that end and start while their policy is replaced


def text(declares: bool, narrow: bool, port: int) -> str:
    address = HOST4 if narrow and declares else "0.0.0.0"
    endpoints = f"endpoints: {{decl: '{address}:dynamic'}}\n" if declares else ""
    name = "decl" if declares else "out"
    ports = "[1]" if narrow else f"[1, {port}]"
    return f"name: shared\n{endpoints}egress: [{{to: {CLIENT4}, ports: {ports}, endpoint: {name}}}]\ndefault: deny\n"


@pytest.mark.parametrize("declares", [False, True])
def test_one_that_ends_before_its_turn_has_the_new_policy_when_it_is_back(
    host: Host, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declares: bool
) -> None:
    saving, file = host.saving, tmp_path / "shared.yaml"
    saving.graft("ep", "add", "out", "0.0.0.0:dynamic")
    with host.client.listener(CLIENT4) as listener:
        port = listener.getsockname()[1]
        file.write_text(text(declares, False, port))
        for path in paths:
            saving.graft("attach", "--cgroup", path, "--policy", file)
        real: Any = saving_module.policy_of
        ended: list[int] = []

        def saved(settings: Any, container: Any, *more: Any) -> Any:
            if container.cgroup == str(paths[1]) and not ended:
                ended.append(container.id)
                paths[1].rmdir()
                saving.remove(container)  # as any command does that finds the cgroup gone
            return real(settings, container, *more)

        monkeypatch.setattr(saving_module, "policy_of", saved)
        new = load_policy(text(declares, True, port), "shared.yaml", saving.installation.endpoints.by_name())
        done = policy_apply.apply(saving.installation, new, save=True)
        assert ended and len(done.containers) == len(done.waiting) == 1
        monkeypatch.undo()
        paths[1].mkdir()
        until("it is attached", lambda: is_attached(saving, paths[1]), 40)
        with puppet(paths[1], host.netns.path) as two, puppet(paths[0], host.netns.path) as one:
            found = one.connect(CLIENT4, port), two.connect(CLIENT4, port), two.connect(CLIENT4, 1)
        cgroup.kill(paths[1])
    assert found == ("EACCES", "EACCES", "ECONNREFUSED")


def is_attached(host: Host, path: Path) -> bool:
    return any(one.cgroup == str(path) for one in host.installation.containers.listing())


def test_one_that_starts_meanwhile_does_not_keep_the_policy_that_it_was_saved_with(
    host: Host, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears after those that wait were looked up, when the first of the others has the new policy."""
    saving, file = host.saving, tmp_path / "shared.yaml"
    saving.graft("ep", "add", "out", "0.0.0.0:dynamic")
    file.write_text(text(False, False, 2))
    for path in paths:
        saving.graft("attach", "--cgroup", path, "--policy", file)
    paths[1].rmdir()
    until("it has ended", lambda: not is_attached(saving, paths[1]))
    real: Any = policy_apply._replace

    def replace(*given: Any, **named: Any) -> Any:
        if not paths[1].exists():
            paths[1].mkdir()
        return real(*given, **named)

    monkeypatch.setattr(policy_apply, "_replace", replace)
    new = load_policy(text(False, True, 2), "shared.yaml", saving.installation.endpoints.by_name())
    policy_apply.apply(saving.installation, new, save=True)
    monkeypatch.undo()
    until("it is attached", lambda: is_attached(saving, paths[1]), 40)
    assert all(f"{CLIENT4}/32:1 " in saving.graft("policy", "show", path).stdout for path in paths)
    saved = Store(saving.settings).read()[0].attachments
    assert [[str(ports) for ports in one.policy.egress[0].ports or ()] for one in saved] == [["1"], ["1"]]


# ---- containers that have asked for their policy themselves


GRAFTS = ("--network", "none", "--runtime", "graft")


def image(docker: Engine, name: str, variable: str) -> str:
    made = docker("create", "--name", f"base-{name}", IMAGE, "true").stdout.strip()
    docker("commit", "--change", f"ENV {variable}", made, name)
    return name


def reaches(docker: Engine, name: str, port: int) -> bool:
    return docker("exec", name, "nc", "-w", "2", CLIENT4, str(port), "-e", "true", status=None).returncode == 0


def policies(host: Host) -> Path:
    folder = host.settings.state_dir / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("kind", ["pairs", "was open"])
def test_a_policy_that_is_not_open_goes_to_nobody_who_has_asked(host: Host, docker: Engine, kind: str) -> None:
    if kind == "pairs":
        host.graft("ep", "add", "openep", f"127.0.0.1:{host.port()}", "--open")
        variable, name = "GRAFT_CONV_PAIRS=0.0.0.0:80=openep", "pairs"
    else:
        variable, name = "GRAFT_POLICY=web", "web"
    file = policies(host) / f"{name}.yaml"
    file.write_text(f"name: {name}\nopen: true\ndefault: {{bind: container, connect: deny}}\n")
    wanted = image(docker, f"hostile-{name}", variable)
    docker("run", "-d", "--name", "evil", *docker.run_flags, *GRAFTS, wanted, "sleep", "1000")
    with host.client.listener(CLIENT4) as listener, new_cgroup("service") as service:
        port = listener.getsockname()[1]
        rule = f"{{to: {CLIENT4}, ports: [{port}], endpoint: out}}"
        file.write_text(f"name: {name}\nendpoints: {{out: 0.0.0.0:dynamic}}\negress: [{rule}]\ndefault: container\n")
        host.graft("attach", "--cgroup", service, "--policy", file)
        done = host.graft("policy", "apply", file, status=0 if kind == "pairs" else 8)
        got = reaches(docker, "evil", port)
        host.remove_at(service)
    docker("rm", "-f", "evil")
    file.unlink()
    assert not got
    assert kind == "pairs" or "has asked for its policy itself" in done.stderr


def test_an_open_policy_that_is_applied_stays_one_that_was_asked_for(host: Host, docker: Engine) -> None:
    file = policies(host) / "web.yaml"
    file.write_text("name: web\nopen: true\ndefault: {bind: container, connect: deny}\n")
    wanted = image(docker, "asks", "GRAFT_POLICY=web")
    docker("run", "-d", "--name", "asks", *docker.run_flags, *GRAFTS, wanted, "sleep", "1000")
    for _ in range(2):
        host.graft("policy", "apply", file)
    [one] = host.installation.containers.listing()
    assert (one.policy, one.origin) == ("web", "asked")
    docker("rm", "-f", "asks")
    file.unlink()


def test_who_has_asked_for_an_endpoint_keeps_no_policy_from_declaring_it_anew(
    host: Host, docker: Engine, tmp_path: Path
) -> None:
    file, port = tmp_path / "shop.yaml", host.port()

    def write(address: str) -> None:
        file.write_text(
            f"name: shop\nendpoints:\n  front: {{address: '{address}:{port}', open: true}}\n"
            "ingress: [{bind: '0.0.0.0:80', endpoint: front}]\ndefault: deny\n"
        )

    wanted = image(docker, "keeper", "GRAFT_CONV_PAIRS=0.0.0.0:81=front")
    with new_cgroup("shop") as shop:
        write("0.0.0.0")
        host.graft("attach", "--cgroup", shop, "--policy", file)
        docker("run", "-d", "--name", "keeper", *docker.run_flags, *GRAFTS, wanted, "sleep", "1000")
        write("127.0.0.1")
        done = host.graft("policy", "apply", file)
        assert "127.0.0.1" in host.graft("policy", "show", shop).stdout
        assert "has asked for front, which is another endpoint now" in done.stderr
        docker("run", "-d", "--name", "other", *docker.run_flags, *GRAFTS, wanted, "sleep", "1000")
        host.remove_at(shop)  # so that nobody has it but who has asked for it
        before = len(list(host.maps.endpoints.keys()))
        write("127.0.0.3")
        host.graft("attach", "--cgroup", shop, "--policy", file)
        assert "127.0.0.3" in host.graft("policy", "show", shop).stdout
        assert len(list(host.maps.endpoints.keys())) == before
        host.remove_at(shop)
        docker("rm", "-f", "other")
    docker("rm", "-f", "keeper")


def test_who_has_asked_for_a_policy_keeps_no_other_from_a_narrower_one(host: Host, docker: Engine) -> None:
    """It was started with transport born, which the new policy does not permit."""
    file = policies(host) / "web.yaml"
    head = "name: web\nopen: true\nendpoints: {out: 0.0.0.0:dynamic}\n"
    file.write_text(head + "egress: [{to: 0.0.0.0/0, endpoint: out}]\ndefault: deny\n")
    asks = ("-e", "GRAFT_POLICY=web", IMAGE, "sleep", "1000")
    docker("run", "-d", "--name", "born", *docker.run_flags, *GRAFTS, *asks)
    with new_cgroup("service") as service:
        host.graft("attach", "--cgroup", service, "--policy", file)
        narrow = f"egress: [{{to: {CLIENT4}, endpoint: out}}, {{to: 127.0.0.0/8, action: container}}]\ndefault: deny\n"
        file.write_text(head + narrow)
        done = host.graft("policy", "apply", file, status=8)
        assert "was started with all its sockets on the host's stack" in done.stderr
        assert f"{CLIENT4}/32" in host.graft("policy", "show", service).stdout
        host.remove_at(service)
    docker("rm", "-f", "born")
    file.unlink()


# ---- graft import


def exported(host: Host, paths: Sequence[Path], file: Path) -> str:
    """An export of containers of one policy."""
    for path in paths:
        host.graft("attach", "--cgroup", path, "--policy", policy(file, "0.0.0.0"))
    return host.graft("export").stdout


def test_an_import_changes_an_endpoint_that_two_declare(host: Host, paths: list[Path], tmp_path: Path) -> None:
    saving, file = host.saving, tmp_path / "all.yaml"
    file.write_text(exported(saving, paths, tmp_path / "shared.yaml").replace("0.0.0.0:dynamic", "127.0.0.1:dynamic"))
    saving.graft("import", file)
    assert all("from decl = 127.0.0.1" in saving.graft("policy", "show", path).stdout for path in paths)


def test_one_that_ends_stops_no_import(
    host: Host, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = host.saving
    narrow = exported(saving, paths, tmp_path / "shared.yaml").replace("to: 127.0.0.0/8", "to: 127.0.0.1/32")
    real: Any = policy_apply.exchange_policy

    def replace(graft: Any, container: Any, *more: Any, **named: Any) -> Any:
        if container.cgroup == str(paths[1]):
            saving.remove_at(paths[1])  # it has ended just now
        return real(graft, container, *more, **named)

    monkeypatch.setattr(transfer, "exchange_policy", replace)
    transfer.import_state(saving.settings, import_text(narrow, "all.yaml"))
    assert "127.0.0.1/32" in saving.graft("policy", "show", paths[0]).stdout


# ---- graft policy learn


Calls = list[tuple[Any, ...]]


def learned(host: Host, path: Path, calls: Calls) -> str:
    program = host.start_command([GRAFT, "policy", "learn", path, "--seconds", "600"])
    program.until("it watches", lambda: "watching" in program.complained)
    watched = host.start_command([GRAFT, "trace", path])
    watched.until("it watches", lambda: "watching" in watched.complained)
    with puppet(path, host.netns.path) as one:
        for call, *words in calls:
            getattr(one, call)(*words)
    watched.says(str(calls[-1][1]))
    program.process.send_signal(signal.SIGINT)
    program.wait()
    return program.said


def test_an_endpoint_that_the_operator_has_narrowed_stays_narrow(host: Host, tmp_path: Path) -> None:
    """The policy was learned before, and the operator has given its source an address."""
    file = tmp_path / "p.yaml"
    file.write_text(
        f"name: p\nendpoints: {{learned-out4: '{HOST4}:dynamic'}}\n"
        f"egress: [{{to: {CLIENT4}, ports: [443], endpoint: learned-out4}}]\ndefault: deny\n"
    )
    with new_cgroup("learned") as path:
        host.graft("attach", "--cgroup", path, "--policy", file)
        found = learned(host, path, [("connect", CLIENT4, 443), ("connect", CLIENT4, 1)])
        host.remove_at(path)
    assert f"learned-out4: {HOST4}:dynamic" in found and "learned-out4-2: 0.0.0.0:dynamic" in found


@pytest.mark.parametrize(
    "calls",
    [
        [("bind", "127.0.0.1", 5432), ("bind", "127:0:0:1::", 5432)],
        [("bind", "2001:db8:1:2:3:4:5:6", 80), ("bind", "2001:db8:1:2:3:4:5:6", 8080)],
    ],
    ids=["families", "31 characters"],
)
def test_what_is_learned_is_a_policy_of_what_was_done(host: Host, tmp_path: Path, calls: Calls) -> None:
    with new_cgroup("learned") as path:
        host.graft("attach", "--cgroup", path, "--deny")
        (tmp_path / "l.yaml").write_text(learned(host, path, calls))
        host.remove_at(path)
    shown = host.graft("policy", "check", "--explain", tmp_path / "l.yaml").stdout
    rules = [line for line in shown.splitlines() if " -> learned-" in line]
    assert len(rules) == 2
    for _, address, port in calls:
        where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        assert any(f" {where} -> " in rule and rule.rstrip().endswith(f"= {where}") for rule in rules), shown


# ---- very many sockets

MANY = """
import signal, socket
kept = []
for number in range(900):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 1024 + number))
    kept.append(sock)
print("has", flush=True)
signal.pause()
"""


def test_the_sockets_of_one_container_are_counted_for_so_long_and_not_longer(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_cgroup("many") as path:
        host.graft("attach", "--cgroup", path)
        command = host.netns.command(sys.executable, "-c", MANY)
        program = host.start_command([*in_cgroup(path), *command])
        program.until("its sockets", lambda: "has" in program.said, 60)
        text = host.graft("metrics").stdout
        assert "\ngraft_sockets_complete 1.0\n" in text
        assert 'protocol="udp",state="unconnected"} 900.0' in text
        monkeypatch.setattr(socket_counts, "_COUNT_SECONDS", 0.0)
        with host.installation as graft, host_stack(graft) as stack:
            counts = socket_counts.count(host.settings, graft.maps, graft.containers.listing(), stack)
        assert counts is not None and not counts.is_whole
        assert sum(sum(kinds.values()) for kinds in counts.by_container.values()) < 900
        cgroup.kill(path)
        host.remove_at(path)
