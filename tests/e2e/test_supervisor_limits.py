"""A supervisor is held to its container's limits: where cgroup v2 has the controllers, and by setrlimit(2) anyway."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from graft.kernel import cgroup
from graft.swap.resource_limits import ADDRESS_SPACE_BYTES
from tests.support.installation import Host

pytestmark = pytest.mark.e2e

CONTROLLERS = set((cgroup.v2_mount() / "cgroup.controllers").read_text().split())
MEMORY = 300 << 20
CPU = "30000 100000"


def test_its_address_space_is_limited(host: Host) -> None:
    program = host.start("--", "sleep", "600")
    supervisor, limit = host.supervisor(program), (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES)
    program.until("it has its limit", lambda: resource.prlimit(supervisor, resource.RLIMIT_AS) == limit)


@pytest.mark.skipif(not {"memory", "cpu"} <= CONTROLLERS, reason="cgroup v2 has no memory and cpu controllers here")
def test_its_own_cgroup_has_the_limits_of_its_container(host: Host) -> None:
    (cgroup.v2_mount() / "cgroup.subtree_control").write_text("+memory +cpu")
    (host.cgroup / "memory.max").write_text(str(MEMORY))
    (host.cgroup / "cpu.max").write_text(CPU)
    try:
        program = host.start("--", "sleep", "600")
        own = cgroup.of_process(host.supervisor(program))
        assert own.name == f"container-{host.container(program).id}"
        assert read(own / "memory.max") == str(MEMORY)
        assert read(own / "memory.swap.max") == "0"
        assert read(own / "cpu.max") == CPU
        program.until("its memory is charged there", lambda: int(read(own / "memory.current")))
    finally:
        (host.cgroup / "memory.max").write_text("max")
        (host.cgroup / "cpu.max").write_text("max")


def read(file: Path) -> str:
    return file.read_text().strip()
