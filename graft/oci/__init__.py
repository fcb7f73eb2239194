"""The OCI runtime wrapper: has a container attached before its first program runs, and is runc or crun otherwise."""
