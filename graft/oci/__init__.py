"""The OCI runtime wrapper: runc or crun, with each container attached before its first program runs.

    main.py             `graft-runtime`: passes each command to runc or crun, and prepares those that start a container
    quick.py            the same by way of the fork server
    container_job.py    what that's children do
    children.py         work that is done once, in a child
    arguments.py        the runtime's own command line
    options.py          what the operator configured
    bundle.py           config.json, read and edited
    request.py          which policy a container asks for, and whether it may have it
    seccomp_profile.py  the container's seccomp profile with the three calls notified
    profile_text.py     such a profile for podman, as text
    features.py         what the real runtime supports
    prepare.py          all of that before the container is made
    hook.py             the commands that the runtime runs as hooks
    plan.py             how one container is attached, and where it is
    shim.py             the process beside one container: its supervisors' keeper
    listener.py         `graft listen`: the same for many containers
    message_loop.py     messages of runtimes, and descriptors to wait for
    state.py            a container's state, as a runtime sends it
    engine_install.py   `graft runtime install`: an engine's configuration is written and checked, or put back
    engine_config.py    what it becomes
    json_members.py     one member of an object in a JSON text, added or removed

`quick.run`, `listener.serve_listener_socket`, `profile_text.profile_text`, `engine_install.install` and `uninstall` are
its face. It may import swap, state, datapath, policy, kernel and model.
"""
