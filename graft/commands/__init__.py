"""What the commands do, without reading options and printing (cli/): one module for each command.

    up.py  renew.py  run.py  run_client.py  run_job.py  attach.py  detach.py  ps.py  down.py  doctor.py  policy_show.py
    policy_apply.py  endpoints.py

    saving.py             saves what these commands change
    restore.py            restores it
    watcher.py            attaches saved containers when they appear; watcher_process.py starts and stops it
    watched_folders.py    the folders that it watches
    sightings.py          since when it has seen the containers that wait
    stale.py              containers whose data plane is gone
    transfer.py           export and import

    trace.py              decisions as they happen, with names
    explain.py            what would happen with an address; rule_in_force.py finds the rule (pure)
    health.py             what is wrong with an installation, and what mends it
    policy_learn.py       the policy for what a container did
    sample.py             what Graft counts, read once
    metrics.py            a sample in Prometheus' text format (pure)
    metrics_server.py     serves that over HTTP
    top.py                two samples as a table with rates (pure)

    transport_choice.py   which transport a container can have (pure)
    find.py               the attached container that has a name, an id or a cgroup
    policy_source.py      a policy from a file or from flags
    cut_off.py            containers that have asked for an endpoint that is another one now
    names.py              names that exist, for a shell's completion

It may import every package but oci and cli.
"""
