"""What an installation contains: endpoints, containers, and the sockets that containers have on the host's stack.

    installation.py    settings, maps and lock in one object; `transaction` to change anything
    endpoints.py       endpoints in the maps
    containers.py      containers in the maps: a cgroup under a policy
    nesting.py         refuses a cgroup above or below one that is attached
    ferries.py         a container's ferry, for those that know only its container
    changed_policy.py  whether a policy's file is still the one that is in force
    call_times.py      how long its supervisors take for calls
    restored.py        whether what is saved was restored into this data plane
    dropped.py         what an import has yet to take away
    records.py         a file for each container, with its name and what is in no map
    begun.py           the same of one that is just being attached or removed, or was when the command was killed
    lost_hooks.py      attaches the hooks again of a container whose cgroup lacks some
    unix_sockets.py    endpoints that are unix sockets: their paths, and those of rules
    bound_sockets.py   which sockets are bound there
    engines.py         finds the cgroup of a container of docker or podman, or of a systemd unit
    inventory.py       the sockets of containers, as the kernel lists them
    stack_listing.py   the listing itself, where it takes as long as strangers have it take
    socket_counts.py   how many of each kind a container has, by the listing alone
    origins.py         the cgroups in which containers' sockets were made
    socket_holders.py  which processes have a descriptor of a socket
    withdrawal.py      closes the sockets that a container was granted
    leftovers.py       closes the sockets that others have of a container that has ended
    leftovers_aside.py    the same for a process that waits for none of them
    helper_process.py  runs system calls that may never return in a child process
    folder_calls.py    makes calls in such a child that are about a folder which somebody may hold
    named_namespaces.py   opens the network namespaces that the operator names
    kept_namespaces.py    keeps those of endpoints
    left_children.py   children that were left behind there
    members.py         the processes and cgroups of containers, listed by such a child
    liveness.py        which supervisors are stuck

It may import datapath, policy, kernel, model and errors.
"""
