#!/usr/bin/env bash
# Train. Without arguments: on a CPU the frozen preset tiny-v3 to its target; on GPUs the head of the lineage on FineWeb.
#   ./run.sh                       ./run.sh short/9 --seed 3                       ./run.sh short/11 --without optim.muon
# Makes .venv first, once (installation/install.py); what it runs is in installation/run.py. Paths are read from the folder that you are in.
set -euo pipefail
self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do  # started by a link
    target=$(readlink -- "$self")
    case $target in /*) self=$target ;; *) self=$(dirname -- "$self")/$target ;; esac
done
. "$(dirname -- "$self")/installation/find_python.sh"
exec "$PYTHON" "$here/installation/install.py" run "$@"
