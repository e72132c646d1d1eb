# Sourced by gpu.sh and eight.sh: sets $PYTHON. $SPEEDRUN_PYTHON, else a python3 that is here already, whose torch sees a GPU
# and which has what a training imports; else .venv, which setup_venv.sh may have to download.
if [ -z "${SPEEDRUN_PYTHON:-}" ]; then
    for candidate in python3 python; do
        sees='import torch, sys; sys.exit(sys.version_info < (3, 11) or not torch.cuda.is_available())'
        if "$candidate" -c "$sees" 2>/dev/null; then
            if missing=$("$candidate" -c 'import train_gpt' 2>&1); then
                SPEEDRUN_PYTHON=$candidate
                echo "python: $candidate, whose torch sees a GPU" >&2
                break
            fi
            echo "$candidate has a torch that sees a GPU, but cannot run a training: ${missing##*$'\n'}" >&2
        fi
    done
fi
. ./installation/setup_venv.sh
