"""A fuzzer of socket calls, with a judge that shares no code with Graft.

    model.py     what a sequence is: endpoints, policies, calls; as JSON, as YAML for Graft
    generate.py  a sequence out of a seed
    arena.py     where it runs: a program in a container of one of the transports, the operator who changes policies
    observe.py   what is seen meanwhile: the host's sockets, packets, who answers
    rules.py     what a policy says, read from its description
    judge.py     which of what was seen was granted by no policy in force
    run.py       one sequence from begin to end; many of them
    shrink.py    the smallest sequence that still fails

The judge knows a policy as the generator made it, not as Graft read it, and the kernel's own word on sockets and
packets, not Graft's maps or counters.
"""
