"""The only place where Graft talks to the kernel by number: a module for each kind of call."""
