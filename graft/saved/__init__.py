"""What outlives a reboot: endpoints, and the policies of attached containers, as files under the state directory.

    model.py      what is saved, as values
    values.py     these as plain values (mappings, lists, text) and back, with every error at its field
    envelope.py   a file's bytes: version, checksum, JSON
    text.py       the whole as YAML, for `graft export` and `graft import`
    store.py      the files: read, prepared, put in place, set aside
    whole.py      all of them, replaced in one step by an import

All but these two are pure. It may import policy, kernel, model and errors; graft/commands restores what is saved.
"""
