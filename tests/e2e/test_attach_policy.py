"""The policy of a container that runs already: shown, replaced, refused."""

from __future__ import annotations

import json
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.datapath.layout import HookDecision
from tests.e2e.conftest import MakeCgroup, StartPuppet, WritePolicy
from tests.support.cgroups import in_cgroup
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.policies import one_endpoint
from tests.support.wait import until

pytestmark = pytest.mark.e2e


def test_a_program_of_graft_run_gets_another_policy_by_attach(host: Host, tmp_path: Path) -> None:
    first, second = host.port(), host.port()
    program = host.start(
        "-i",
        f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{first}')}",
        "--",
        "sh",
        "-c",
        "busybox nc -l -p 80; busybox nc -l -p 80",
    )
    program.until("it listens", lambda: host.netns.listens(first))
    said = host.graft(
        "attach", "--cgroup", host.container(program).cgroup, "-i", f"*:80={host.endpoint(f'0.0.0.0:{second}')}"
    )
    assert "transport swap: it has a supervisor" in said.stdout
    host.client.connected(HOST4, first).close()
    program.until("it listens on the other endpoint", lambda: host.netns.listens(second))


def test_a_policy_is_shown_and_replaced_with_its_endpoints(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path, first, second = make_cgroup(), host.port(), host.port()
    text = """
name: shown
endpoints:
  shown4: 0.0.0.0:PORT
ingress:
  - bind: 0.0.0.0:8000-8099
    endpoint: shown4
egress:
  - to: 10.0.0.0/8
    action: deny
default:
  connect: container
  bind: deny
"""
    host.graft("attach", "--cgroup", path, "--policy", write_policy(text.replace("PORT", str(first))))
    shown = host.graft("policy", "show", path).stdout
    assert f"ingress any 0.0.0.0:8000-8099 -> shown4 = 0.0.0.0:{first}" in shown
    assert "egress any 10.0.0.0/8 -> deny" in shown and "else: bind deny, connect container" in shown
    said = host.graft("policy", "apply", write_policy(text.replace("PORT", str(second)))).stdout
    assert said.startswith(f"{path.name}: policy shown")
    assert json.loads(host.graft("policy", "show", path, "--json").stdout)["rules"][1]["outcome"].endswith(f":{second}")
    program = start_puppet(path)
    program.listener("0.0.0.0", 8042)
    assert host.netns.listens(second) and not host.netns.listens(first)
    assert host.graft("policy", "apply", write_policy("name: not-in-use\n"), status=3).stderr
    host.graft("detach", "--cgroup", path)
    assert "shown4" not in host.graft("ep", "show").stdout


def test_no_policy_is_lost_where_the_next_one_is_wrong(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path, port = make_cgroup(), host.port()
    good = f"name: kept\nendpoints:\n  kept4: 0.0.0.0:{port}\ningress:\n  - bind: 0.0.0.0:80\n    endpoint: kept4\n"
    host.graft("attach", "--cgroup", path, "--policy", write_policy(good))
    wrong = good.replace(str(port), str(host.port())) + "  - bind: 0.0.0.0:81\n    endpoint: nowhere\n"
    host.graft("attach", "--cgroup", path, "--policy", write_policy(wrong), status=2)
    start_puppet(path).listener("0.0.0.0", 80)
    assert host.netns.listens(port)


def test_endpoints_of_a_policy_that_is_refused_stay_as_they_were(
    host: Host, make_cgroup: MakeCgroup, write_policy: WritePolicy
) -> None:
    path, port = make_cgroup(), host.port()
    taken = host.endpoint(f"0.0.0.0:{host.port()}")
    text = f"name: kept\nendpoints:\n  kept5: 0.0.0.0:{port}\ningress:\n  - bind: 0.0.0.0:80\n    endpoint: kept5\n"
    host.graft("attach", "--cgroup", path, "--policy", write_policy(text))
    other = text.replace(str(port), str(host.port())).replace("ingress:", f"  {taken}: 0.0.0.0:9\ningress:")
    host.graft("attach", "--cgroup", path, "--policy", write_policy(other), status=4)
    assert f"kept5 = 0.0.0.0:{port}" in host.graft("policy", "show", path).stdout
    assert len(list(host.maps.endpoints.keys())) == len(host.graft("ep", "show").stdout.splitlines())


def test_a_policy_is_replaced_under_load_with_no_refused_request(
    host: Host, make_cgroup: MakeCgroup, write_policy: WritePolicy, tmp_path: Path
) -> None:
    path, front, back = make_cgroup(), host.port(), host.port()
    inlet, outlet = host.endpoint(f"0.0.0.0:{front}"), host.endpoint("127.0.0.7:dynamic")
    egress = f"egress:\n  - to: 127.0.0.0/8\n    ports: [{back}]\n    endpoint: {outlet}\n"
    texts = [one_endpoint(inlet, egress=egress), one_endpoint(inlet, egress=egress).replace("confined", "same-again")]
    policies = [write_policy(text) for text in texts]
    host.graft("attach", "--cgroup", path, "--policy", policies[0])
    # Each request makes nginx connect to a server behind it, by a rule without which it is refused.
    configuration = tmp_path / "proxy.conf"
    scratch = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    configuration.write_text(
        f"""daemon off; worker_processes 1; pid {tmp_path}/pid; error_log {tmp_path}/errors; user root;
events {{ worker_connections 512; }}
http {{ access_log off; client_body_temp_path {tmp_path}/body; {scratch}
  server {{ listen 80; location / {{ proxy_pass http://127.0.0.1:{back}; }} }} }}"""
    )
    behind = tmp_path / "behind.conf"
    behind.write_text(
        configuration.read_text()
        .replace("/pid", "/pid2")
        .replace("listen 80", f"listen 127.0.0.1:{back}")
        .replace(f"proxy_pass http://127.0.0.1:{back};", "return 200 'served\\n';")
    )
    with ExitStack() as stack:
        for command in (
            host.netns.command("nginx", "-c", behind),
            host.netns.command(*in_cgroup(path), "nginx", "-c", configuration),
        ):
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.terminate)
        until("nginx listens", lambda: host.netns.listens(front) and host.netns.listens(back))
        load = subprocess.Popen(
            host.client.command("hey", "-z", "60s", "-c", "4", "-disable-keepalive", f"http://{HOST4}:{front}/"),
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(load.kill)
        for number in range(6):
            said = host.graft("attach", "--cgroup", path, "--policy", policies[number % 2 - 1]).stdout
            assert "replaces the old one" in said
        assert load.poll() is None, "the load ended before the last replacement"
        load.send_signal(signal.SIGINT)  # hey sends no more requests, and prints its report
        said, _ = load.communicate()
    assert "[200]" in said and "[502]" not in said and "Error distribution" not in said, said
    decisions = host.decisions(host.ps_of(path)["id"])
    assert decisions[HookDecision.CONNECTED] > 100 and HookDecision.REFUSED_CONNECT not in decisions
