#!/usr/bin/env bash
# Run the tests (arguments go to pytest): ./test.sh -k neutral
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_venv.sh
exec "$PYTHON" -m pytest -q "$@"
