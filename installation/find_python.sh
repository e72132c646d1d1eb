# Sourced by run.sh, test.sh and setup_venv.sh: sets $here, the checkout, and $PYTHON, a Python that can start installation/install.py.
# SPEEDRUN_PYTHON=/path/to/python: an existing environment instead of .venv (a CUDA build of torch, say).
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ -n "${SPEEDRUN_PYTHON:-}" ]; then
    PYTHON=$SPEEDRUN_PYTHON
    if [ "$("$PYTHON" -c 'print(6 * 7)' 2>/dev/null)" != 42 ]; then
        echo "error: SPEEDRUN_PYTHON=$PYTHON is no Python that can be started: name one, or unset it" >&2
        exit 2
    fi
elif [ -e "$here/.venv/installed" ] && "$here/.venv/bin/python" -I -c '' 2>/dev/null; then
    PYTHON=$here/.venv/bin/python
else
    PYTHON=
    found=
    # the pinned packages exist for 3.11 to 3.14; -I: whatever PYTHONPATH and the user's own packages are
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        version=$("$candidate" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        case $version in
            3.11 | 3.12 | 3.13 | 3.14) ;;
            *) found="$found $candidate is $version,"; continue ;;
        esac
        if "$candidate" -I -c 'import ensurepip, venv' 2>/dev/null; then PYTHON=$candidate; break; fi
        found="$found $candidate ($version) lacks the venv module (Debian, Ubuntu: apt install python3-venv),"
    done
    if [ -z "$PYTHON" ]; then
        echo "error: Python 3.11 to 3.14 with its venv module is needed; here${found:- is none}${found:+ and that is all}" >&2
        exit 2
    fi
fi
