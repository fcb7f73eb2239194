"""The benchmark for developers: `python -m tests.bench` (`make bench`) is `graft bench` (graft/bench/), and writes
docs/performance.md; lean.py (`make bench-lean`) measures memory and the time to start programs.
"""
