#!/usr/bin/env bash
# Slower than CI allows: the tests that are marked slow, 2,000 bent claims, then the full matrix, every record on 1, 2 and 4 processes, with
# its table tests/matrix.md. Arguments: records, for the matrix of these alone.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
. ./installation/setup_venv.sh
[ $# -gt 0 ] || "$PYTHON" -m pytest -q -m slow
[ $# -gt 0 ] || "$PYTHON" tests/fuzz_claims.py 2000
exec "$PYTHON" tests/matrix.py "$@"
