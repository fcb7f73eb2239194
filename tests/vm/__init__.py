"""`make test-kernels`: Graft on other kernels, in virtual machines that are as its users' machines are.

A Debian 12 with systemd and cgroup v2 only, made ready by the project's own `make setup`, boots Debian's kernels one
after the other under QEMU's emulation (no KVM: slow, but it needs nothing of this machine). In each a job runs:

    __main__.py     what to test, several guests at a time; one line for each kernel
    kernels.py      which of the kernels that apt lists are meant (pure)
    apt.py          a private apt configuration: other suites than this machine's, nothing installed here
    disk.py         the root file system and its image, cached; kernels and their initrds
    initrd.py       an initrd of busybox and a few modules, byte by byte (pure)
    qemu.py         one run of QEMU: the job goes in and the results come out on disks of their own
    report.py       what a guest left, as a line (pure)
    jobs/           what runs in a guest: the whole, the quick form, a kernel that is too old, the table of helpers
    core.txt        the tests of tests/e2e that run in a guest
    same_everywhere.txt    those of tests/kernel that do not
    guest/          tests that need a machine of their own: a real systemd unit
    files/          what the root file system has besides: the service that runs the job
"""
