"""Endpoints that are unix sockets of the host, with real programs on both sides, in every transport."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import unix_rights
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.nginx import nginx
from tests.support.plain import Plain
from tests.support.program import Program
from tests.support.relayed import reset
from tests.support.shell import Word, output
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

STAND_IN = "10.99.0.5"
NOBODY = pwd.getpwnam("nobody")

SERVER = """
import os, socket, sys
path = sys.argv[1]
sock = socket.socket(socket.AF_UNIX)
try:
    sock.bind(path)
except OSError as error:
    print("refused", error.errno, flush=True)
    raise SystemExit(3)
print("bound", sock.getsockname(), flush=True)
sock.listen(8)
while True:
    peer = sock.accept()[0]
    data = peer.recv(100)
    peer.sendall(b"echo " + data)
    peer.close()
"""


@pytest.fixture
def folder(root: None) -> Iterator[Path]:
    """A folder with a path that is short enough, and that any user may enter."""
    with tempfile.TemporaryDirectory(prefix="gu-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def endpoint(host: Host, path: Path, *options: Word) -> str:
    """A new endpoint at ``path``."""
    name = f"u{len(json.loads(host.graft('ep', 'show', '--json').stdout))}"
    host.graft("ep", "add", name, f"unix:{path}", *options)
    return name


def curl(path: Path) -> str:
    """What a web server behind a unix socket answers."""
    return output(["curl", "-sS", "--max-time", "10", "--unix-socket", path, "http://app/"])


def until_there(program: Program, path: Path) -> None:
    program.until(f"{path} is there", path.is_socket)


def ask(path: Path, text: bytes = b"hello") -> bytes:
    """What a server at ``path`` answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10 * PATIENCE)
        sock.connect(str(path))
        sock.sendall(text)
        return sock.recv(100)


# ---- a container's TCP listener behind a unix socket ------------------------------------------------


def test_nginx_under_graft_run_answers_at_the_path(host: Host, folder: Path, tmp_path: Path) -> None:
    path = folder / "app.sock"
    app = endpoint(host, path, "--owner", "nobody", "--mode", "0640")
    program = nginx(host, tmp_path, ["-i", f"0.0.0.0:80={app}"], "0.0.0.0:80")
    until_there(program, path)
    assert curl(path).startswith("80 127.0.0.1 127.0.0.1")
    status = path.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (NOBODY.pw_uid, 0o640)
    assert not host.netns.listens(80)
    shown = host.ps()[0]
    assert shown["transport"] == "swap"
    assert [one["address"] for one in shown["relay"]["published"]] == [f"unix:{path}"]
    program.stop()
    assert not path.exists()
    assert list(folder.iterdir()) == []


def test_nginx_in_an_attached_container_serves_haproxy_and_curl(
    container: Plain, host: Host, folder: Path, tmp_path: Path
) -> None:
    listener = container.start("busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", tmp_path)
    (tmp_path / "index.html").write_text("from inside\n")
    listener.until("httpd", lambda: container.netns.listens(80))
    path, port = folder / "app.sock", host.port()
    container.attach("-i", f"0.0.0.0:80={endpoint(host, path)}")
    assert curl(path) == "from inside\n"
    (tmp_path / "haproxy.cfg").write_text(
        "defaults\n mode http\n timeout connect 5s\n timeout client 10s\n timeout server 10s\n"
        f"frontend f\n bind 0.0.0.0:{port}\n default_backend b\nbackend b\n server s unix@{path}\n"
    )
    proxy = host.start_command(host.netns.command("haproxy", "-db", "-f", tmp_path / "haproxy.cfg"))
    proxy.until("haproxy", lambda: host.netns.listens(port))
    assert host.client.fetch(HOST4, port) == "from inside\n"
    listener.stop()
    until("the path is gone with the listener", lambda: not path.exists())


def test_a_large_transfer_passes_the_socket_unchanged(container: Plain, host: Host, folder: Path) -> None:
    listener = container.listener()
    path = folder / "app.sock"
    container.attach("-i", f"0.0.0.0:80={endpoint(host, path)}")
    data = os.urandom(1 << 22)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20 * PATIENCE)
        client.connect(str(path))
        accepted = listener.accept()[0]
        accepted.settimeout(20 * PATIENCE)
        for near, far in ((client, accepted), (accepted, client)):
            near.setblocking(False)
            sent, received = 0, bytearray()
            deadline = time.monotonic() + 20 * PATIENCE
            while len(received) < len(data) and time.monotonic() < deadline:
                if sent < len(data):
                    try:
                        sent += near.send(data[sent:])
                        continue
                    except BlockingIOError:
                        pass
                received += far.recv(1 << 16)
            assert bytes(received) == data
            near.settimeout(20 * PATIENCE)
        client.shutdown(socket.SHUT_WR)
        assert accepted.recv(1) == b""
        accepted.sendall(b"half-closed")
        assert client.recv(100) == b"half-closed"
        accepted.close()


def test_a_container_in_the_hosts_namespace_listens_for_the_relay_alone(
    host: Host, folder: Path, tmp_path: Path
) -> None:
    path = folder / "app.sock"
    rules = ["--net", str(host.netns.path), "-i", f"0.0.0.0:80={endpoint(host, path)}"]
    program = nginx(host, tmp_path, rules, "0.0.0.0:80")
    until_there(program, path)
    assert host.ps()[0]["transport"] == "direct"
    assert curl(path).startswith("80 ")
    assert not host.netns.listens(80)
    relay = host.ps()[0]["relay"]["published"][0]
    port = int(relay["dials"].rpartition(":")[2])
    assert host.netns.listens(port)
    with host.netns.inside(), socket.socket() as sock:
        sock.settimeout(2)
        with pytest.raises(TimeoutError):
            sock.connect(("127.0.0.1", port))


def test_a_running_program_gets_and_loses_a_unix_endpoint(host: Host, folder: Path, tmp_path: Path) -> None:
    path = folder / "app.sock"
    app = endpoint(host, path)
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: p\n")
    (tmp_path / "index.html").write_text("later\n")
    program = host.start("--policy", policy, "--", "busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", tmp_path)
    host.supervisor(program)
    policy.write_text(f"name: p\ningress:\n  - {{bind: '*:80', endpoint: {app}}}\n")
    host.graft("policy", "apply", policy)
    until_there(program, path)
    assert curl(path) == "later\n"
    policy.write_text("name: p\n")
    host.graft("policy", "apply", policy)
    assert not path.exists()


def test_the_next_daemon_replaces_what_one_that_was_killed_left(container: Plain, host: Host, folder: Path) -> None:
    listener, path = container.listener(), folder / "app.sock"
    container.attach("-i", f"0.0.0.0:80={endpoint(host, path)}")
    before = path.stat().st_ino
    container.host.kill_daemon()
    until("the daemon is dead", lambda: not container.described()["serves"])
    assert path.stat().st_ino == before
    daemon = host.start_daemon()
    until("replaced", lambda: path.exists() and path.stat().st_ino != before)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"again")
        accepted = listener.accept()[0]
        assert accepted.recv(10) == b"again"
        accepted.close()
    listener.close()
    daemon.stop()
    assert not path.exists()


def test_descriptors_that_a_client_passes_are_refused(container: Plain, host: Host, folder: Path) -> None:
    listener, path = container.listener(), folder / "app.sock"
    container.attach("-i", f"0.0.0.0:80={endpoint(host, path)}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"before")
        accepted = listener.accept()[0]
        accepted.settimeout(15 * PATIENCE)
        with accepted:
            assert accepted.recv(1000) == b"before"
            if unix_rights.refused_by_kernel():
                with pytest.raises(PermissionError):
                    socket.send_fds(client, [b"with"], [0, 1])
                client.sendall(b"after")
                assert accepted.recv(1000) == b"after"
            else:
                socket.send_fds(client, [b"with"], [0, 1])
                assert reset(accepted)


def test_attach_says_which_rules_need_a_supervisor(container: Plain, host: Host, folder: Path) -> None:
    rule = f"unix:/own.sock={endpoint(host, folder / 'app.sock')}"
    said = host.graft("attach", "--cgroup", container.cgroup, "-i", rule).stdout
    assert f"-i {rule} has no effect: a unix socket of the program's own is bound by a supervisor" in said
    refused = host.run(["--net", str(host.netns.path), "-i", rule], "true", status=7)
    assert "transport direct has none" in refused.stderr


# ---- a container's client, and a unix socket of the host --------------------------------------------


@pytest.fixture(scope="module")
def cluster(root: None) -> Iterator[Path]:
    """A PostgreSQL cluster that listens on a unix socket only, and asks the kernel who its clients are."""
    made = Path(tempfile.mkdtemp(prefix="gup-"))
    shutil.chown(made, "postgres", "postgres")
    output([*as_postgres(), pg_program("initdb"), "-D", made / "data", "--auth=reject", "--no-sync"])
    (made / "data/pg_hba.conf").write_text("local all all peer\n")
    yield made
    shutil.rmtree(made)


def as_postgres() -> list[Word]:
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]


def pg_program(name: str) -> Path:
    return max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))


@pytest.fixture
def database(host: Host, cluster: Path) -> str:
    """A running PostgreSQL's endpoint."""
    words: list[Word] = [*as_postgres(), pg_program("postgres"), "-D", cluster / "data", "-k", cluster]
    server = host.start_command([*words, "-c", "listen_addresses=", "-c", "fsync=off"])
    server.until("PostgreSQL is ready", lambda: "ready to accept connections" in server.complained, timeout=30)
    return endpoint(host, cluster / ".s.PGSQL.5432")


def psql(user: str = "postgres") -> list[Word]:
    query = "select inet_client_addr() is null, length(repeat('x', 1000000))"
    connection = f"host={STAND_IN} port=5432 user={user} dbname=postgres sslmode=disable"
    return ["psql", "-At", "-c", query, "-c", "select repeat('x', 1000000)", connection]


@pytest.mark.parametrize("shared", [False, True])
def test_psql_reaches_a_postgresql_that_listens_on_a_unix_socket_only(host: Host, database: str, shared: bool) -> None:
    rules = ["--net", str(host.netns.path)] if shared else []
    rules += ["--user", "postgres", "-e", f"{STAND_IN}={database}"]
    said = host.run(rules, *psql()).stdout
    assert said.startswith("t|1000000\n")
    assert said.count("x") == 1_000_000


def test_the_server_is_shown_the_programs_user_and_not_roots(host: Host, database: str) -> None:
    refused = host.run(["--user", "nobody", "-e", f"{STAND_IN}={database}"], *psql(), status=2)
    assert "Peer authentication failed" in refused.stderr


def test_psql_in_an_attached_container(container: Plain, host: Host, database: str) -> None:
    container.attach("-e", f"{STAND_IN}={database}")
    said = output(container.command(*as_postgres(), *psql()))
    assert said.startswith("t|1000000\n")


@pytest.mark.parametrize("shared", [False, True])
def test_other_ports_do_not_lead_to_the_socket(host: Host, database: str, tmp_path: Path, shared: bool) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        f"name: p\negress:\n  - {{to: {STAND_IN}, ports: [5432], endpoint: {database}}}\ndefault: {{connect: deny}}\n"
    )
    rules: list[Word] = ["--policy", policy]
    if shared:
        rules += ["--net", host.netns.path]
    code = f"import socket; print(socket.socket().connect_ex(('{STAND_IN}', 5433)))"
    assert host.run(rules, "python3", "-c", code).stdout == "13\n"
    assert host.run([*rules, "--user", "postgres"], *psql()).stdout.startswith("t|")


def test_a_path_without_a_server_resets_the_connection(host: Host, folder: Path) -> None:
    app = endpoint(host, folder / "nobody.sock")
    code = f"""
import socket
sock = socket.socket()
sock.connect(("{STAND_IN}", 80))
try:
    print(sock.recv(1))
except ConnectionResetError:
    print("reset")
"""
    said = host.run(["-e", f"{STAND_IN}={app}"], "python3", "-c", code).stdout
    assert said == "reset\n"


def test_a_connection_waits_for_room_in_a_full_backlog(host: Host, folder: Path) -> None:
    path = folder / "busy.sock"
    app = endpoint(host, path)
    code = f"import socket; s = socket.create_connection(('{STAND_IN}', 80)); print(s.getpeername(), s.recv(100))"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(0)
        with socket.socket(socket.AF_UNIX) as filler:
            filler.connect(str(path))
            program = host.start("-e", f"{STAND_IN}={app}", "--", "python3", "-c", code)
            until("a waiting connection", lambda: any(one["relay"]["connections"] for one in host.ps()))
            time.sleep(0.3)
            assert program.process.poll() is None
            server.accept()[0].close()
            server.settimeout(10 * PATIENCE)
            peer = server.accept()[0]
            peer.sendall(b"served")
            peer.close()
        assert program.wait() == 0
    assert program.said == f"('{STAND_IN}', 80) b'served'\n"


# ---- a program's own unix socket --------------------------------------------------------------------


def test_a_programs_own_socket_is_bound_at_the_hosts_path(host: Host, folder: Path, tmp_path: Path) -> None:
    path = folder / "app.sock"
    app = endpoint(host, path, "--mode", "0600")
    rules = ["--user", "nobody", "-v", "-i", f"unix:/deep/in/side/own.sock={app}"]
    program = host.start(*rules, "--", "python3", "-c", SERVER, "/deep/in/side/own.sock")
    program.says("bound /deep/in/side/own.sock")
    until("it listens", lambda: path.is_socket() and ss_listens(path))
    status = path.stat()
    assert (status.st_uid, status.st_gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert ask(path) == b"echo hello"
    assert f"bind unix:/deep/in/side/own.sock -> unix:{path}" in program.complained
    assert host.ps()[0]["relay"] is None
    assert not Path("/deep").exists()
    shown = host.graft("policy", "show", str(host.container(program).id)).stdout
    assert f"ingress unix /deep/in/side/own.sock -> {app} = unix:{path}" in shown
    program.stop()
    assert not path.exists()
    assert list(folder.iterdir()) == []


def ss_listens(path: Path) -> bool:
    try:
        return ask(path).startswith(b"echo")
    except ConnectionRefusedError:
        return False


def test_the_socket_goes_with_its_rule(host: Host, folder: Path, tmp_path: Path) -> None:
    path = folder / "app.sock"
    app = endpoint(host, path)
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"name: p\ningress:\n  - {{bind: 'unix:/own.sock', endpoint: {app}}}\n")
    program = host.start("--policy", policy, "--", "python3", "-c", SERVER, "/own.sock")
    program.says("bound")
    assert path.is_socket()
    policy.write_text("name: p\n")
    host.graft("policy", "apply", policy)
    assert not path.exists()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(host: Host, folder: Path) -> None:
    path = folder / "app.sock"
    app = endpoint(host, path)
    rules = ["-i", f"unix:/own.sock={app}"]
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
        old.listen()
        refused = host.run(rules, "python3", "-c", SERVER, "/own.sock", status=4)
        assert refused.stderr == f"graft: {path}: another process listens there (ss -xlp src {path})\n"
    program = host.start(*rules, "--", "python3", "-c", SERVER, "/own.sock")
    program.says("bound")
    until("it listens", lambda: ss_listens(path))


@pytest.mark.parametrize("rule", ["0.0.0.0:80", "unix:/own.sock"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "exists, and is not a socket"),
        ("link", "exists, and is not a socket"),
        ("missing", "there is no directory"),
        ("linked", "leads through, a symbolic link"),
    ],
)
def test_what_stands_in_the_way_is_one_clear_line(host: Host, folder: Path, rule: str, kind: str, message: str) -> None:
    path = folder / "app.sock"
    if kind == "file":
        path.touch()
    elif kind == "link":
        path.symlink_to(folder / "elsewhere")
    elif kind == "missing":
        path = folder / "none" / "app.sock"
    else:
        (folder / "linked").symlink_to("/run")
        path = folder / "linked" / "app.sock"
    app = endpoint(host, path)
    refused = host.run(["-i", f"{rule}={app}"], "true", status=4)
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"graft: {path}: ")


def test_a_socket_that_appears_later_refuses_the_bind_and_is_left_alone(host: Host, folder: Path) -> None:
    path = folder / "app.sock"
    app = endpoint(host, path)
    code = "import sys; sys.stdin.readline()\n" + SERVER
    program = host.start("-v", "-i", f"unix:/own.sock={app}", "--", "python3", "-c", code, "/own.sock", talk=True)
    host.supervisor(program)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        before = path.stat().st_ino
        program.tell("\n")
        program.says("refused 98")
        assert path.stat().st_ino == before
        assert f"{path}: another process listens there" in program.complained


# ---- the command line -------------------------------------------------------------------------------


def test_an_endpoint_is_shown_with_its_path_owner_and_mode(host: Host, folder: Path) -> None:
    app = endpoint(host, folder / "app.sock", "--owner", "nobody:daemon", "--mode", "0600")
    shown = json.loads(host.graft("ep", "show", app, "--json").stdout)[0]
    assert shown == {
        "name": app,
        "address": f"unix:{folder}/app.sock",
        "ports": 1,
        "family": "unix",
        "protocol": "tcp",
        "netns": None,
        "open": False,
        "dual_stack": False,
        "multicast": [],
        "declared": False,
        "owner": "nobody:daemon",
        "mode": "0600",
    }
    host.graft("ep", "set", app, f"unix:{folder}/other.sock")
    assert f"unix:{folder}/other.sock" in host.graft("ep", "show").stdout
    host.graft("ep", "del", app)
    refused = host.graft("ep", "add", app, f"unix:{folder}/app.sock", "--owner", "no-such-user", status=3)
    assert "owner: 'no-such-user' not found" in refused.stderr


def test_a_policy_declares_such_an_endpoint(host: Host, folder: Path, tmp_path: Path) -> None:
    path = folder / "app.sock"
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "name: p\nendpoints:\n"
        f"  app: {{address: 'unix:{path}', owner: nobody, mode: '0640'}}\n"
        f"  short: unix:{folder}/short.sock\n"
        "ingress:\n  - {bind: '*:80', endpoint: app}\n  - {bind: 'unix:/own.sock', endpoint: short}\n"
    )
    assert "ok (2 ingress" in host.graft("policy", "check", policy).stdout
    program = host.start("--policy", policy, "--", "busybox", "httpd", "-f", "-p", "127.0.0.1:80", "-h", tmp_path)
    until_there(program, path)
    (tmp_path / "index.html").write_text("declared\n")
    assert curl(path) == "declared\n"
    program.stop()
    assert json.loads(host.graft("ep", "show", "--json").stdout) == []
    assert list((host.settings.run_dir / "unix").iterdir()) == []
