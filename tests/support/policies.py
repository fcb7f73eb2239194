"""Policies that several tests use."""

from __future__ import annotations

DENY_ALL = "name: nothing\ndefault: deny\n"


def one_endpoint(endpoint: str, bind: str = "0.0.0.0:80", egress: str = "") -> str:
    """A policy that grants ``endpoint`` to one bind, and what the section ``egress`` says; it denies all else."""
    return f"name: confined\ningress:\n  - bind: '{bind}'\n    endpoint: {endpoint}\n{egress}default: deny\n"
