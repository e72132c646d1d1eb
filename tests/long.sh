#!/usr/bin/env bash
# The full matrix: every record on 1, 2 and 4 processes. Slower than CI allows; writes the table tests/matrix.md.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
. ./installation/setup_venv.sh
exec "$PYTHON" tests/matrix.py "$@"
