"""The splice transport: containers that already run, served by relays in the daemon `graftd`.

    connection.py   a relayed connection, two sockets and the bytes between them: the state machine
    pipes.py        the pipes that bytes are spliced through
    kernel_flow.py  one direction that the kernel moves: copying what it leaves, forwarding the end
    sockmap.py      the BPF maps by which the kernel moves it
    selftest.py     tests the relay in the kernel on this kernel
    selftest_result.py  its result, stored while it is valid
    kernel_relay.py the relay in the kernel, for containers that are to have it, once the self-test has passed

    event_loop.py   the event loop
    turns.py        which owner's call is made next (pure)
    slow_calls.py   owners whose calls are slow wait
    outside.py      connections that are slow on the side that is not the container's wait by themselves
    jobs.py         work that takes more than one turn
    background.py   calls that block, made in threads
    closing.py      sockets whose close may wait, closed by a process that exits
    questions.py    about a container's folders, which it can hold: asked of a child
    shares.py       how much of something limited each container may have (pure)
    resources.py    a container's turns, descriptors and pipes

    namespace_sockets.py  sockets made in another network namespace
    namespaces.py   the namespaces that sockets are made in
    publication.py  which listeners are published, and which address is dialled for each (pure)
    listeners.py    what a container listens on, found in steps
    acceptor.py     a listener of the daemon, which accepts while there is room
    far_check.py    whether a dialled connection came to the container, and to nobody else
    inbound.py      a listener on an endpoint
    unix_endpoint.py  a unix socket of the host in the place of either endpoint
    waiting.py      an accepted connection whose unix socket has no room yet
    outbound.py     the listener to which the connect hook redirects granted connections
    datagrams.py    UDP, both ways, and how it is relayed over IPv4
    stand_ins.py    how over IPv6
    stand_in_sockets.py       its sockets: made, closed, and what is left of them
    forgotten.py              what stood for a forgotten remote end, until nothing is left to read (pure)
    datagram_clients.py       clients of a container's UDP sockets, and the sockets at endpoints that hear them
    datagram_places.py        how many clients of all containers have an entry in the maps
    datagram_destinations.py  destinations of a container's UDP sockets
    datagram_sockets.py       UDP sockets of the daemon
    relays.py       all three, for one container
    kept.py               what outlives this graftd, and what the one before has left
    kept_records.py           what is noted of it, in memory that both have
    descriptor_store.py       how the keeper is told to have it open
    keeper_watch.py           another keeper, when that is killed
    restored_connections.py   which connections go on, and how
    unserved.py           what the one before has left of containers that are not served yet
    watchdog.py               tells the keeper that graftd works
    container_list.py     the containers to serve
    cgroups.py            whether their cgroups still exist
    container_service.py  how one container is served
    service.py      all containers: what the daemon runs
    log.py          the daemon's log
    daemon.py       graftd, the process
    control.py      how commands talk to the daemon
    commands.py     the daemon's end of that

    __main__.py        the same as a program of its own
    native/            the compiled form of some of these modules, for graftd only
    daemon_process.py  starts, asks, replaces and stops graftd, and its keeper
    traffic.py         what graftd has relayed, as it answers `client.traffic` (pure)
    client.py       what `graft attach`, `detach` and `ps` use: the interface of this package

It may import state, datapath, policy, kernel, keeper and model. Its hooks are in bpf/splice.bpf.c, bpf/exchange.bpf.c
and bpf/stand_in.bpf.c, the relay in the kernel in bpf/relay.bpf.c.
"""
