"""Transport swap: a supervisor that puts a socket of the host's stack in the place of a program's.

    launch.py           a program in its namespace, with the filter that traps its calls
    keeper.py           keeps a listener, and a supervisor at work
    supervisor.py       serves trapped calls
    decision.py         what to do with one (pure)
    desk.py             what the hooks know of a socket, in one system call
    socket_pool.py      sockets made in the right namespace, ahead of time
    socket_copy.py      options, owner and flags of one socket given to another
    descriptors.py      other descriptors of a socket, and epoll registrations
    processes.py        the processes that notifications name
    unreported.py       binds that were done, but whose callers did not hear (pure)
    end_watcher.py       waits for the end beside a thread that waits for calls
    resource_limits.py  a supervisor's own cgroup
    call_log.py         a line for each call

`launch.launch` and `keeper.Keeper` are its face. It may import state, datapath, policy, kernel, model and errors.
"""
