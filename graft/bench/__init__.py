"""`graft bench`: what a program pays under Graft on this machine, beside the host's own stack and other ways.

One run makes its own namespaces, cgroups and installation of Graft, measures every case in every round, and compares
within the round, because a number from another minute or another machine says little.

    command.py       the whole run, from options to results
    options.py       what may be chosen, and what a quick run is (pure)
    scratch.py       folder, cgroup and pins of one run; removes what a killed run left
    topology.py      the namespaces and how they are joined
    own_graft.py     the installation of Graft that is measured
    cases.py         what a case is; those without Graft: the host, a bridge with NAT
    supervised.py    under graft run: swap, born
    attached.py      under graft attach: direct, splice
    proxies.py       programs that publish a port of a container
    usernet.py       programs that give a container a network from user space
    bypass4netns.py  the same, by replacing sockets
    workloads.py     what is measured: a server, a client, and the numbers that come out
    outputs.py       reads those numbers from what the clients print (pure)
    growth.py        the cost of a call as rules and containers grow
    runner.py        rounds, progress and the bound of time
    report.py        medians, ratios, bounds, JSON and the tables (pure)
    bars.py          the same as bars in a terminal
    chart.py         the same as a picture
    process.py       programs that are started and ended
    compiled/peer.c  the clients and servers for ping-pong and connections, built at installation
"""
