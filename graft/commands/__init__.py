"""What the commands do, without reading options and printing (cli/): one module for each command.

    run.py  run_client.py  run_job.py  attach.py  detach.py  ps.py  down.py  doctor.py  policy_show.py  policy_apply.py

    transport_choice.py   which transport a container can have (pure)
    find.py               the attached container that has a name, an id or a cgroup
    policy_source.py      a policy from a file or from flags

It may import every package but oci and cli. (`ep` and `up` are one call each: graft/state/endpoints.py,
graft/datapath/dataplane.py.)
"""
