"""The BPF side: the C sources compiled and pinned, the maps with their layouts, programs attached to cgroups.

    layout.py          the structures of bpf/graft.h
    sources.py offsets.py programs.py    what is compiled, with which constants, for which hooks
    bcc_compiler.py    bcc, the only module that knows it
    loader.py          what this kernel takes of it
    maps.py            the pinned maps, with their types
    rulesets.py        compiled rules written, erased and looked up
    attachments.py     which cgroups the programs are attached to
    dataplane.py       all of it made and switched in, under the installation's lock

It may import policy, kernel, model and errors.
"""
