# Sourced by the scripts in bench/ and tests/: sets $PYTHON to a Python that can train and plot, and makes .venv if there is none.
. "$(dirname -- "${BASH_SOURCE[0]}")/find_python.sh"
if [ -z "${SPEEDRUN_PYTHON:-}" ]; then PYTHON=$("$PYTHON" "$here/installation/install.py" python); fi
