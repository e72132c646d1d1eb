"""What the benches share: timing, and the JSON that they write."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the trainer does, before torch loads its thread pool

import torch

import runlog


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best(step, repeats):
    """(seconds of the first call, least seconds of the others)."""
    times = []
    for _ in range(1 + repeats):
        wait()
        began = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - began)
    return times[0], min(times[1:])


def about():
    """Hardware, versions and commit."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(), "code": runlog.code_version(),
            **runlog.machine()}


def write(path, **tables):
    """The tables and what they were measured on, as JSON; nothing without a path."""
    if path:
        Path(path).write_text(json.dumps({"about": about(), **tables}, indent=1) + "\n")
