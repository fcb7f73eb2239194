"""Choosing kernels, making an initrd and reading results: the parts of tests/vm that need no machine."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.vm import apt, initrd, qemu, report
from tests.vm.kernels import Kernel, NoSuchKernel, choose, listed
from tests.vm.report import Result, Suite

PACKAGES = [
    "linux-image-6.1.0-9-cloud-amd64",
    "linux-image-6.1.0-56-cloud-amd64",
    "linux-image-6.1.0-56-cloud-amd64-unsigned",
    "linux-image-6.12.118+deb13-cloud-amd64",
    "linux-image-7.3.4+deb13-cloud-amd64",
    "linux-binary-7.3.4+deb13-cloud-amd64",
    "linux-modules-7.3.4+deb13-cloud-amd64",
    "linux-image-5.10.0-46-cloud-amd64",
    "linux-image-cloud-amd64",
]


def test_a_kernel_has_all_the_packages_of_its_release() -> None:
    newest = listed(PACKAGES)[-1]
    assert newest.release == "7.3.4+deb13-cloud-amd64"
    assert {name.split("-")[1] for name in newest.packages} == {"image", "binary", "modules"}


def test_the_newest_of_a_line_is_chosen_and_newer_is_by_number() -> None:
    kernels = listed(PACKAGES)
    assert [one.release for one in choose(["6.1", "newest"], kernels)] == [
        "6.1.0-56-cloud-amd64",
        "7.3.4+deb13-cloud-amd64",
    ]
    assert choose(["7.3", "newest"], kernels) == choose(["newest"], kernels)


def test_a_kernel_that_debian_does_not_have_is_named() -> None:
    with pytest.raises(NoSuchKernel, match=r"no kernel 5\.15: 5\.10, 6\.1, 6\.12, 7\.3"):
        choose(["5.15"], listed(PACKAGES))


def test_what_is_too_old_is_known() -> None:
    assert not Kernel("5.10.0-46-cloud-amd64", ()).is_supported
    assert Kernel("6.1.0-56-cloud-amd64", ()).is_supported


def test_modules_are_loaded_after_those_that_they_need() -> None:
    dep = (
        "kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc16.ko.xz\n"
        "kernel/fs/jbd2/jbd2.ko.xz:\nkernel/lib/crc16.ko.xz:\nkernel/drivers/block/virtio_blk.ko.xz:\n"
    )
    assert [initrd.module_name(path) for path in initrd.load_order(dep)] == ["virtio_blk", "crc16", "jbd2", "ext4"]


def test_an_initrd_is_an_archive_that_cpio_reads(tmp_path: Path) -> None:
    data = gzip.decompress(initrd.initrd(b"busybox!", {"kernel/a-b.ko": b"module"}))
    assert len(data) % 4 == 0
    busybox = shutil.which("busybox")
    assert busybox is not None, "make setup: missing busybox"
    subprocess.run([busybox, "cpio", "-id"], cwd=tmp_path, input=data, capture_output=True, check=True)
    assert (tmp_path / "bin/busybox").read_bytes() == b"busybox!"
    assert (tmp_path / "bin/sh").readlink() == Path("busybox")
    assert (tmp_path / "modules/a_b.ko").read_bytes() == b"module"
    assert "insmod /modules/a_b.ko" in (tmp_path / "init").read_text()


JUNIT = (
    "<testsuites><testsuite>"
    "<testcase classname='t' name='good'/><testcase classname='t' name='left'><skipped/></testcase>"
    "<testcase classname='t' name='bad'><failure/></testcase></testsuite></testsuites>"
)


def test_tests_are_counted_and_failures_named() -> None:
    found = report.count(JUNIT)
    assert found == Suite(3, 1, ("t::bad",))
    assert found.passed == 1


def test_a_line_has_what_a_script_wants() -> None:
    result = Result("6.1", "whole", 1, 812.4, {"demo": 0, "doctor": 6}, {"kernel": report.count(JUNIT)})
    assert report.line(result) == (
        "kernel=6.1 job=whole result=fail demo=pass doctor=fail kernel_tests=1/2 skipped=1 seconds=812"
    )
    assert report.failures(result) == ["step doctor (status 6)", "t::bad"]


def test_a_line_says_that_a_run_was_interrupted() -> None:
    result = Result("6.1", "units", 1, 600, {"units": 124}, {"units": report.count(JUNIT)})
    assert " units_status=124 units=" in report.line(result)
    assert "step units (status 124)" in report.failures(result)


def test_a_guest_that_was_ended_says_timeout() -> None:
    assert "result=timeout" in report.line(Result("6.1", "whole", None, 9, timed_out=True))


def test_the_refusal_of_an_old_kernel_is_a_pass() -> None:
    assert report.line(Result("5.10", "refusal", 0, 30, {"up": 6})) == "kernel=5.10 job=refusal result=pass seconds=30"


def test_results_are_read_from_their_folder(tmp_path: Path) -> None:
    for name, text in (("status", "0\n"), ("demo.status", "0\n"), ("e2e.xml", JUNIT), ("e2e.status", "1\n")):
        (tmp_path / name).write_text(text)
    found = report.read(tmp_path, "6.1", "whole", 5)
    assert (found.passed, dict(found.steps), found.tests["e2e"].passed) == (
        True,
        {"demo": 0, "e2e": 1},
        1,
    )
    assert report.failures(found) == ["t::bad"]


def test_a_run_of_pytest_that_left_no_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "e2e.status").write_text("4\n")
    found = report.read(tmp_path, "6.1", "whole", 5)
    assert "e2e=none" in report.line(found)
    assert report.failures(found) == ["step e2e (status 4)"]


def test_results_come_out_of_a_tar_that_may_be_cut_short(tmp_path: Path) -> None:
    whole = qemu.packed(
        [("out/status", _file(tmp_path / "a", b"0\n")), ("out/big", _file(tmp_path / "b", bytes(99_999)))]
    )
    for size, names in ((len(whole), {"status", "big"}), (5000, {"status"}), (0, set())):
        out = tmp_path / f"out-{size}"
        out.mkdir()
        disk = _file(tmp_path / "disk", whole[:size] + bytes(0 if size == 5000 else 1 << 20))
        qemu.unpack(disk, out)
        assert {path.name for path in out.iterdir()} == names


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "sources",
    [
        "Types: deb\nURIs: http://a.example/debian/\n\nURIs: http://b.example/debian-security\n",
        "deb [arch=amd64] http://a.example/debian bookworm main\ndeb http://b.example/debian-security/ x main\n",
    ],
)
def test_the_archives_are_read_from_this_machines_sources(sources: str) -> None:
    assert apt.archive(sources, "debian") == "http://a.example/debian"
    assert apt.archive(sources, "debian-security") == "http://b.example/debian-security"
    assert apt.archive("# http://a.example/debian\n", "debian") is None


@pytest.mark.parametrize("names", ["core.txt", "same_everywhere.txt"])
def test_the_tests_that_are_named_for_a_guest_are_there(names: str) -> None:
    root = Path(__file__).resolve().parents[2]
    for line in (root / "tests/vm" / names).read_text().splitlines():
        file, _, name = line.partition("::")
        assert not file or file.startswith("#") or f"def {name}(" in (root / file).read_text() or not name, line
