#!/usr/bin/env bash
# Run the tests on two processes (arguments go to pytest): ./test.sh -k neutral
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # one thread each, else they wait for each other
exec "$PYTHON" -m pytest -q -n 2 "$@"
