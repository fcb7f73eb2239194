"""What a container may do: from text to map entries. Pure, except for files.py.

    model.py        rules and defaults, as values
    files.py        the text of a file
    reader.py       a policy's text, with every error at its line and field
    fields.py       the fields of one endpoint or rule in it
    document.py     the YAML under it
    validator.py    whether rules fit their endpoints and each other
    conflicts.py    which rules claim the same ports
    compiler.py     map entries
    writer.py       a policy's values again, as its file would have them
    learning.py     the smallest policy for what was seen
    limits.py       how big a policy may be
    schema.py       its JSON schema, for editors

Other packages call `reader.load_policy`, `model.policy_from_flags`, `compiler.compile_policy` and
`schema.policy_schema`. It imports only graft.model and graft.errors.
"""
