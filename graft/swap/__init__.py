"""Transport swap: a supervisor replaces a program's socket by one of the host's stack.

    launch.py           starts a program in its namespace, with the filter that traps its calls
    keeper.py           keeps a listener open, and its supervisor running
    waiter.py           what `graft run` becomes: the same for one program, small (compiled_waiter/: in C)
    supervision.py      the process of a supervisor
    fork_client.py      a child of the fork server for a command
    fork_servers.py     the fork servers that run, and their end
    supervisor.py       serves trapped calls
    decision.py         what to do with a trapped call (pure)
    desk.py             what the hooks know about a socket, in one system call
    birth.py            sockets that are made on the host's stack
    ferry.py            brings datagrams from the host's stack to the container's namespace, and back
    ferry_owners.py     as whose sockets
    berths.py           which of a ferry's addresses stands for which peer inside
    ferry_client.py     starts a container's ferry, and asks it
    socket_pool.py      replacement sockets, made in the right namespace, some ahead of time
    socket_copy.py      copies options, owner and flags of one socket to another
    descriptors.py      duplicates of a socket's descriptor, and its epoll registrations
    unix_bind.py        a unix socket bound at an endpoint's path
    processes.py        the processes that made the trapped calls
    unreported.py       binds that succeeded, but whose callers did not get the result (pure)
    end_watcher.py      stops a supervisor that waits for a notification
    resource_limits.py  a supervisor's own cgroup
    call_log.py         a line for each trapped call
    fast_calls.py       what the compiled part does (compiled/, C), which answers plain calls

`launch.launch` and `keeper.Keeper` are its interface. It may import state, datapath, policy, kernel, model and errors.
"""
