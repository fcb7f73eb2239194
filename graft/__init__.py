"""Graft: sockets of a container, served by the host's network stack."""

__version__ = "0.1.0"
