"""What the benches share: timing, and the JSON that they write."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the trainer does, before torch loads its thread pool

import numpy as np
import torch

import runlog
from data.shards import write_shard

EOT, MEDIAN, SIGMA = 50256, 400, 1.04  # lengths of FineWeb's documents, as data/corpus.py


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


def synthetic_shards(folder, train_tokens, val_tokens):
    """Shards of random GPT-2 ids in documents of log-normal lengths."""
    random = np.random.default_rng(0)
    for name, count in (("bench_train_000001.bin", train_tokens), ("bench_val_000000.bin", val_tokens)):
        tokens = random.integers(0, EOT, count, dtype=np.uint16)
        starts = np.cumsum(random.lognormal(np.log(MEDIAN), SIGMA, count // 100).astype(np.int64) + 2)
        tokens[0] = tokens[starts[starts < count]] = EOT
        write_shard(folder / name, tokens)


def write(path, **tables):
    """The tables and what they were measured on, as JSON; nothing without a path."""
    if path:
        Path(path).write_text(json.dumps({"about": about(), **tables}, indent=1) + "\n")
