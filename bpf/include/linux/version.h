/* bcc stamps each program with a version; cgroup programs are not checked against it. */
#ifndef GRAFT_LINUX_VERSION_H
#define GRAFT_LINUX_VERSION_H
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 15, 0)
#endif
