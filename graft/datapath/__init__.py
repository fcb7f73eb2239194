"""The BPF side: the C sources compiled and pinned, the maps with their layouts, programs attached to cgroups.

    layout.py          the structures and constants of bpf/graft.h
    sources.py offsets.py programs.py    what is compiled, with which constants, for which hooks
    bcc_compiler.py bytecode.py    compiles with bcc, which no other module imports; what comes out
    compile_cache.py   keeps what was compiled
    compiled.py        its maps made, and each program loaded on its own
    loader.py          loads the programs that this kernel accepts
    maps.py            the pinned maps, with their types
    rulesets.py        compiled rules written, erased and looked up
    decisions.py       decisions of the hooks as they happen
    exchanges.py       relayed datagrams of a container erased
    attachments.py     which cgroups the programs are attached to
    renewal.py         the hooks of another version replaced, on the same maps
    dataplane.py       makes, pins and removes all of this, under the installation's lock

It may import policy, kernel, model and errors.
"""
