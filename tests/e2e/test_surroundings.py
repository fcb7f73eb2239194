"""Hosts that lack something: nothing is mounted for pins, or the kernel has no type information. Each is tried in a
mount namespace of its own, by an installation of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import installation
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4, Netns

pytestmark = pytest.mark.e2e

WITHOUT_BPFFS = "umount -l /sys/fs/bpf && ! mountpoint -q /sys/fs/bpf"
WITHOUT_BTF = "mount --bind /dev/null /sys/kernel/btf/vmlinux"
SERVES = """
set -e
{without}
{graft} up
{graft} doctor >{folder}/doctor.txt
{graft} ep add web 0.0.0.0:{port}
exec {graft} run -i 0.0.0.0:80=web -- busybox httpd -f -p 80 -h {folder}
"""


@pytest.fixture
def other_host(net: tuple[Netns, Netns], tmp_path: Path) -> Iterator[Host]:
    """The same namespaces, with an installation that is not up."""
    with installation(tmp_path, *net, "bare") as made:
        yield made
        made.stop_programs()


@pytest.mark.parametrize(
    ("without", "lacks"),
    [("true", []), (WITHOUT_BPFFS, []), (WITHOUT_BTF, ["type information"])],
    ids=["nothing", "bpffs", "BTF"],
)
def test_a_program_is_served_on_a_host_that_lacks_it(other_host: Host, without: str, lacks: list[str]) -> None:
    host, port = other_host, other_host.port()
    script = SERVES.format(without=without, graft=GRAFT, folder=host.folder, port=port)
    server = host.start_command(["unshare", "--mount", "--", "sh", "-c", script])
    server.until("it listens", lambda: host.netns.listens(port), timeout=90)
    found = dict(line.split("\t")[1::-1] for line in host.client.fetch(HOST4, port, "/doctor.txt").splitlines()[1:])
    assert [name for name in ("bpffs", "type information") if found[name] != "yes"] == lacks
    assert not host.netns.listens(80)
