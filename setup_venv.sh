# Sourced by run.sh and test.sh: makes .venv with the pinned dependencies once, and sets $PYTHON.
# SPEEDRUN_PYTHON=/path/to/python uses an existing environment instead (a CUDA build of torch, say).
if [ -n "${SPEEDRUN_PYTHON:-}" ]; then
    PYTHON=$SPEEDRUN_PYTHON
else
    PYTHON=.venv/bin/python
    want=$(cat pyproject.toml | cksum)
    if [ ! -x "$PYTHON" ] || [ "$(cat .venv/pins 2>/dev/null)" != "$want" ]; then
        base=
        for candidate in python3 python3.13 python3.12 python3.11; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then base=$candidate; break; fi
        done
        if [ -z "$base" ]; then echo "error: Python 3.11 or newer is needed and was not found" >&2; exit 2; fi
        echo "installing the pinned dependencies into .venv (once)" >&2
        rm -f .venv/pins
        "$base" -m venv .venv || { echo "error: cannot create .venv with $base -m venv: install its venv module" >&2; exit 2; }
        # shellcheck disable=SC2046
        "$PYTHON" -m pip install --quiet --disable-pip-version-check $("$PYTHON" - <<'PY'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *(p for extra in project["optional-dependencies"].values() for p in extra))
PY
        ) || { echo "error: pip could not install the pinned dependencies; see its message above" >&2; exit 2; }
        printf '%s' "$want" > .venv/pins
    fi
fi
