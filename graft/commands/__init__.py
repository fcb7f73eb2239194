"""What the commands do, without their words: one module for each verb.

    run.py  attach.py  detach.py  ps.py  down.py  doctor.py  policy_show.py  policy_apply.py

    transport_choice.py   which transport serves a container (pure)
    find.py               the attached container that somebody means
    policy_source.py      a policy from a file or from flags

It may import everything but cli. (`ep` and `up` are one call each: graft/state, graft/datapath.)
"""
