"""graftd's keeper: a small process that starts graftd, starts it again, and has open what must outlive it.

    protocol.py   what graftd and its keeper say to each other: systemd's sd_notify protocol (pure)
    holdings.py   the descriptors that the keeper has, by their names
    closing.py    closes them, without ever waiting for what others have sent to one
    lines.py      the lines of its log, and of graftd's
    restarts.py   how long to wait before graftd is started again (pure)
    own_names.py  what graftd looks up in its own folder in /proc, which others can hold
    prepared.py   a child that is forked, and given its descriptors when nobody can hold it any more
    child.py      graftd as the keeper's child: started with those descriptors, watched, killed
    process.py    the keeper, the process

Under systemd the service manager is the keeper: graftd speaks to it in the same way.

It imports nothing else of Graft's, and little of Python's: all of it stays in memory as long as graftd runs.
"""
