#!/usr/bin/env bash
# Slower than CI allows: the tests that are marked slow, then the full matrix, every record on 1, 2 and 4 processes,
# with its table tests/matrix.md; 2,000 bent claims; 1,000 damaged files of each kind; the mutants with their table
# tests/mutants.md and a hundred SIGKILLs with theirs, tests/kills.md (both go on where they were stopped). Arguments:
# records, for the rows of these alone.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
. ./installation/setup_venv.sh
[ $# -gt 0 ] || "$PYTHON" -m pytest -q -m slow
"$PYTHON" tests/matrix.py "$@"
[ $# -eq 0 ] || exit 0
"$PYTHON" tests/fuzz_claims.py 2000
FUZZ_CASES=1000 "$PYTHON" -m pytest -q tests/test_fuzz.py
"$PYTHON" tests/mutants.py
exec "$PYTHON" tests/kills.py
