"""What an installation has: endpoints and containers, and the sockets that containers have on the host's stack.

    installation.py    settings, maps and lock in one object; `transaction` to change anything
    endpoints.py       endpoints in the maps
    containers.py      containers: a cgroup under a policy
    records.py         the file about each
    engines.py         from what an operator calls a container to its cgroup
    inventory.py       the sockets of containers, as the kernel lists them
    descriptors.py     which processes have a socket
    withdrawal.py      ends what a container was granted
    helper_process.py  system calls that may never return
    liveness.py        supervisors that do not answer

It may import datapath, policy, kernel, model and errors.
"""
