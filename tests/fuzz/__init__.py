"""A fuzzer of socket calls, with a judge that shares no code with Graft.

    model.py     what a sequence is: endpoints, policies, calls; as JSON, as YAML for Graft
    generate.py  a sequence out of a seed
    arena.py     where it runs: a program in a container of one of the transports, the operator who changes policies
    observe.py   what is seen meanwhile: the host's sockets, packets, group memberships
    rules.py     what a policy says, read from its description
    judge.py     what was seen that no policy in force grants
    run.py       one sequence from begin to end; many of them
    shrink.py    the smallest sequence that still fails

The judge knows a policy as the generator made it, not as Graft read it, and sockets and packets as the kernel shows
them, not Graft's maps or counters.
"""
