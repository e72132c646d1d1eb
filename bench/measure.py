"""Shared parts of the benches: timing, description of the machine, and random shards."""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the trainer does, before torch loads its thread pool

from common import environment  # refuses a Python that is too old

environment.require(*environment.TRAINING)

import numpy as np
import torch

from common import files, repository
import runlog
from data.shards import GPT2, write_shard

EOT, MEDIAN, SIGMA = 50256, 400, 1.04  # lengths of FineWeb's documents, as data/corpus.py
QUEUED = 5  # calls that wait behind one pause: the GPU's queue holds about a thousand kernels
CYCLES, LONGEST_PAUSE = 2e9, 0.1  # a second of a GPU's clock, at most; seconds
LAG = 8  # places between a token of `repeating_shards` and the one that it repeats
L2 = 2 ** 28  # bytes, more than any card's L2 cache


def wait() -> None:
    """Wait until the GPU has finished; does nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(step: Callable[[], Any]) -> float:
    """Wall seconds of one call, until the device has done it."""
    wait()
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


def best(step: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """(seconds of the first call, seconds of a later call).

    The second is the least of the repeats on a CPU, and the median of `queued` on a GPU.
    """
    first = seconds(step)
    if torch.cuda.is_available():
        return first, statistics.median(queued(step, repeats))
    return first, min(seconds(step) for _ in range(repeats))


def queued(step: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call on the GPU's own clock (CUDA events).

    Python takes tens of microseconds for a call, as long as a small kernel runs: so the GPU is given a pause,
    in which the calls queue up, and none waits for Python. Before each one a write of 256 MiB empties the L2
    cache, as the other layers of a training do. A step that reads results on the host waits for them here as
    it does there.
    """
    began = time.perf_counter()
    step()
    host = time.perf_counter() - began
    wait()
    cold, times = torch.empty(L2, dtype=torch.uint8, device="cuda"), []
    while len(times) < repeats:
        n = min(QUEUED, repeats - len(times))
        torch.cuda._sleep(int(CYCLES * min(LONGEST_PAUSE, 1.5 * n * (host + 1e-4))))
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in pairs:
            cold.zero_()
            start.record()
            step()
            end.record()
        wait()
        times += [start.elapsed_time(end) / 1000 for start, end in pairs]
    return times


def about() -> dict:
    """Hardware, versions and commit."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "code": repository.code_version(), **runlog.machine()
    }


def lengths(random: np.random.Generator, count: int, longest: int | None = None) -> np.ndarray:
    """(count,) lengths of documents as FineWeb has them."""
    drawn = random.lognormal(np.log(MEDIAN), SIGMA, count).astype(np.int64) + 2
    return drawn if longest is None else np.minimum(drawn, longest)


def synthetic_shards(folder: Path, train_tokens: int, val_tokens: int) -> None:
    """Shards of random GPT-2 ids in documents of log-normal lengths.

    Their frequencies leave about as many distinct ids as text has, 11,000 in a record's 49,152 tokens: as
    many rows of the tables have a gradient, and the candidates of record 92 suffice.
    """
    random = np.random.default_rng(0)
    names = random.permutation(EOT)
    shares = np.cumsum((np.arange(EOT) + 10.0) ** -1.15)
    for name, count in (("bench_train_000001.bin", train_tokens), ("bench_val_000000.bin", val_tokens)):
        tokens = names[np.searchsorted(shares / shares[-1], random.random(count)).clip(max=EOT - 1)]
        starts = np.cumsum(lengths(random, count // 100))
        tokens[0] = tokens[starts[starts < count]] = EOT
        write_shard(folder / name, tokens)
    files.write(folder / "corpus.json", files.json_text({**GPT2, "name": "random tokens"}) + "\n")


def repeating_shards(folder: Path, train_tokens: int, val_tokens: int) -> None:
    """Shards of GPT-2 ids that a model learns from: frequencies after Zipf, and one token in four repeats the
    one LAG places before it. They are the same on every machine."""
    random = np.random.default_rng(1)
    names = random.permutation(EOT)
    shares = np.cumsum(1 / (np.arange(EOT) + 10.0))
    for name, count in (("bench_train_000001.bin", train_tokens), ("bench_val_000000.bin", val_tokens)):
        rows = -(-count // LAG)
        drawn = names[np.searchsorted(shares / shares[-1], random.random(rows * LAG)).clip(max=EOT - 1)]
        fresh = random.random((rows, LAG)) >= 0.25
        fresh[0] = True
        source = np.maximum.accumulate(np.where(fresh, np.arange(rows)[:, None], 0))  # (rows, LAG)
        tokens = np.take_along_axis(drawn.reshape(rows, LAG), source, 0).ravel()[:count]
        starts = np.cumsum(lengths(random, count // 100))
        tokens[0] = tokens[starts[starts < count]] = EOT
        write_shard(folder / name, tokens)
    files.write(folder / "corpus.json", files.json_text({**GPT2, "name": "repeating tokens"}) + "\n")
