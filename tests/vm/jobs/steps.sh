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

tests() { # NAME SECONDS ARGUMENTS OF PYTEST...
    # Ended with SIGINT, pytest still writes its report: what was tested up to there is known.
    local name=$1 seconds=$2
    shift 2
    step "$name" timeout --signal=INT --kill-after=60 "$seconds" "$PYTHON" -m pytest -v -p no:cacheprovider --timeout 600 "--junitxml=/out/$name.xml" "$@"
}
