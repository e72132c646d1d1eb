#!/usr/bin/env bash
# Run the tests on two processes: ./test.sh. Arguments go to pytest, paths are of the checkout: ./test.sh -k neutral
# Run the tests that guard one setting, in seconds: ./test.sh --feature model.attn.gate
# Adds what the tests need to .venv first, once (installation/install.py).
set -euo pipefail
self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do  # started by a link
    target=$(readlink -- "$self")
    case $target in /*) self=$target ;; *) self=$(dirname -- "$self")/$target ;; esac
done
. "$(dirname -- "$self")/installation/find_python.sh"
exec "$PYTHON" "$here/installation/install.py" test "$@"
