"""Containers of every kind under load, while what serves them is killed: `python -m tests.soak`, or `make soak`."""
