#!/usr/bin/env bash
# Runs a program on the null device: run.sh PROGRAM.py ARGS ..., or run.sh COMMAND ARGS ... (a shell script,
# say, whose Python
# programs then run there too, by $SPEEDRUN_PYTHON). Makes the device first if it is missing (build.sh). The
# exit code is
# the program's; each Python process that used the device prints one line at its end, or leaves a file (see
# README.md).
set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
if [ $# -eq 0 ]; then
    echo "usage: tests/nullcuda/run.sh PROGRAM.py ARGS ... | COMMAND ARGS ..." >&2
    exit 2
fi
library=$(bash "$here/build.sh")
export SPEEDRUN_PYTHON=${library%/*}/venv/bin/python
export SPEEDRUN_NULL_DEVICE=1
export PYTHONPATH=$here/python${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_COMPILE_THREADS=1
export TORCHINDUCTOR_FORCE_DISABLE_CACHES=${TORCHINDUCTOR_FORCE_DISABLE_CACHES:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export LD_LIBRARY_PATH=$library${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export NULLCUDA_LIBRARY=$library/libcuda.so.1
export LD_PRELOAD=$NULLCUDA_LIBRARY${LD_PRELOAD:+:$LD_PRELOAD}
case $1 in
*.py | -m | -c) exec "$SPEEDRUN_PYTHON" "$@" ;;
*) exec "$@" ;;
esac
