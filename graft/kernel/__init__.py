"""System calls, one module for each part of the kernel: numbers, structures, thin functions that raise OSError.

    syscalls.py            calls that no library has, by number
    bpf.py btf.py helpers.py ringbuf.py       maps and programs; types; which helpers are allowed; ring buffers
    bpf_load.py instructions.py bpf_maps.py   programs loaded from their instructions; what is in these; maps made
    cgroup.py netns.py mounts.py              v2 folders, network namespaces, bpffs
    pidfd.py process.py tasks.py              processes and their descriptors, memory and threads
    credentials.py capabilities.py keyring.py terminal.py   rights, and dropping them
    seccomp.py                                filters, notifications, ADDFD
    sockdiag.py sockets.py                    socket diagnostics: netlink messages; sockets listed and closed with them
    socket_calls.py tcp.py epoll.py           what can be asked of one socket, and done with it
    unix_files.py unix_rights.py              unix sockets of the host's file system; descriptors sent over them
    fork_server.py fork_messages.py           a process that forks for others; messages with descriptors
    peers.py                                  which process is at the other end of a unix socket
    surroundings.py                           whether two processes have the same rights and see the same
    atomic_file.py file_lock.py inotify.py    files replaced in one step; locks; folders that change

It may import model and errors.
"""
