#!/usr/bin/env bash
# The CUDA path on a machine without a GPU: tests/cuda.sh [--list] [--again] [ROW ...]
#
# Makes a device that computes nothing (tests/nullcuda/README.md; the first time it installs 5 GB), tests the
# device itself,
# and runs each row on it: a record at full width, eager or compiled, or with a kernel. Results:
# tests/nullcuda/table.md.
# ROW: words of the rows' names (all without). A run that is stopped goes on where it was; rows of other code
# are run again.
# About a minute of CPU time for a compiled row, ten seconds for an eager one. No part of .ci/run.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
library=$(bash tests/nullcuda/build.sh)
case " $* " in
*" --list "*) ;;
*) said=$(tests/nullcuda/run.sh tests/nullcuda/selftest.py 2>&1) || { echo "$said" >&2; exit 1; } ;;
esac
exec "${library%/*}/venv/bin/python" tests/nullcuda/rows.py "$@"
