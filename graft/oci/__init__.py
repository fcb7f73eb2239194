"""The OCI runtime wrapper: runc or crun, with each container attached before its first program runs."""
