# Sourced by the jobs. A step's output goes to /out/NAME.log and to the stream, its status to /out/NAME.status.
PYTHON=.venv/bin/python

step() { # NAME COMMAND...
    local name=$1 status
    shift
    echo "== $name"
    "$@" 2>&1 | tee "/out/$name.log"
    status=${PIPESTATUS[0]}
    echo "$status" >"/out/$name.status"
    return "$status"
}

tests() { # NAME ARGUMENTS OF PYTEST...
    local name=$1
    shift
    step "$name" "$PYTHON" -m pytest -q -p no:cacheprovider --timeout 600 "--junitxml=/out/$name.xml" "$@"
}
