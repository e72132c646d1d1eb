"""Tests that are programs too: what Triton's interpreter and compiler do, they do in processes of their own,
so that no other test sees Triton."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))  # aot.py; behind the repository, whose `kernels` is another one


def program_of(file):
    """program(*arguments, **environment) -> the JSON that this test file, run with them, prints in its last
    line."""
    return functools.partial(run, file)


def run(file, *arguments, **environment):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, file, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=env | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
