/* bcc includes this before anything else; the one symbol it looks for. */
#ifndef GRAFT_LINUX_KCONFIG_H
#define GRAFT_LINUX_KCONFIG_H
#define CONFIG_BPF_SYSCALL 1
#endif
