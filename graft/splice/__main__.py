"""graftd as a program of its own, the child of its keeper: `python -m graft.splice [--keep]`.

Nothing of graftd is imported before it is known whether its compiled modules are (native/).
"""

from __future__ import annotations

import sys

from graft.splice import native

if __name__ == "__main__":
    native.use()
    from graft.splice.daemon import main

    main("--keep" in sys.argv[1:])
