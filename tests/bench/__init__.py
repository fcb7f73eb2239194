"""The benchmark: what a program pays under Graft, beside the host's own stack and a bridge with NAT.

`make bench` runs it. One run builds its own namespaces, measures every case in every round, and compares within the
round, because a number from another minute or another machine says little.

    topology.py   the namespaces and how they are joined
    workloads.py  what is measured: a server, a client, and the number that comes out
    cases.py      where the server or the client runs: on the host, behind a bridge, under graft run
    relays.py     the same for a container that runs already: splice with either relay, and proxies used instead
    report.py     medians, ratios, bounds, the JSON file and the table (pure)
    chart.py      the same as a picture
    runner.py     rounds and progress
    process.py    programs that are started and ended
    peer.c        the ping-pong and connect programs
"""
