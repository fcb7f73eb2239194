"""The splice transport: containers that already run, served by relays in the daemon `graftd`.

    connection.py   two sockets and the bytes between them: the state machine
    pipes.py        what bytes travel through
    kernel_flow.py  a flow that the kernel moves: catching up, and its end
    sockmap.py      the maps by which it does
    selftest.py     whether this kernel does it right
    selftest_result.py  how long what that found holds
    kernel_relay.py the relay in the kernel for whoever is to have it, once it has passed

    event_loop.py   the event loop
    turns.py        whose turn it is in the loop (pure)
    jobs.py         work that takes more than one turn
    background.py   calls that wait, made in threads
    shares.py       who may have one more of what is scarce (pure)
    resources.py    a container's turns, descriptors and pipes

    namespace_sockets.py  sockets made in a container's namespace
    namespaces.py   the namespaces that they are made in
    publication.py  which listeners are published, and what is dialled for them (pure)
    listeners.py    what a container listens on, in steps
    acceptor.py     a listener of ours: accepting while there is room
    inbound.py      a listener on an endpoint
    outbound.py     the relay inside, to which the connect hook redirects granted connections
    relays.py       both, for one container
    container_list.py     which containers there are
    container_service.py  one container's course in the daemon
    service.py      all containers: what the daemon runs
    daemon.py       graftd, the process of all that
    control.py      how commands talk to the daemon
    commands.py     the daemon's end of that

    daemon_process.py  starting and stopping graftd
    client.py       what `graft attach`, `detach` and `ps` ask of it: the package's face

It may import state, datapath, policy, kernel and model. The hooks behind it are in bpf/splice.bpf.c, the relay in the
kernel in bpf/relay.bpf.c.
"""
