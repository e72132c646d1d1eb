"""Exploration noise of NorMuon (log of record 87, @cong_ml and the AI system Recursive).

Random numbers are a hash of (key of the matrix, step, place in the matrix), in whole-number operations alone:
no generator has a state, so that they are the same on any device and number of processes, in a resumed run,
under torch.compile and in a replayed CUDA graph.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from schedule import StepPlan
from updates.slots import Slot, Step, kept_dtype
from updates.views import Views

BITS = 0xFFFFFFFF
KEY = "matrix_key"  # state of a rule that optim.Bank fills with keys_of each stored matrix


def keys_of(identity: str, count: int) -> torch.Tensor:
    """The keys (count, 2) int64, two words of 32 bits each, of the matrices that are stored together.

    identity: what their initial values were drawn by: seed, name, part.
    """
    digests = (hashlib.sha256(f"{identity}/{i}".encode()).digest() for i in range(count))
    return torch.tensor([
        [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")] for digest in digests
    ], dtype=torch.int64).view(count, 2)


def mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijection of words of 32 bits (int64) in which each bit depends on all, that of splitmix32 (bryc).

    Its factors, of the hash-prospector (C. Wellons), are below 2^31, so that no product overflows.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & BITS
    x = ((x ^ (x >> 15)) * 0x735A2D97) & BITS
    return x ^ (x >> 15)


def normal(key: torch.Tensor, step: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers in the shape and dtype of `like` (..., rows, cols), by Box and Muller.

    key: (..., 1, 2) int64. Of each number two words become uniform numbers of 24 bits; the largest is 5.9.
    """
    rows, cols = like.shape[-2:]
    place = torch.arange(rows * cols, device=like.device).view(rows, cols)
    words = mixed(mixed(key + step & BITS) ^ key.flip(-1))  # of this step, (..., 1, 2)
    first = mixed(mixed(place ^ words[..., :1]) ^ words[..., 1:])
    second = mixed(first + 0x9E3779B9 & BITS)
    u, angle = (((x >> 8).to(like.dtype) + 0.5) * 2.0**-24 for x in (first, second))
    return (-2 * u.log()).sqrt() * (2 * math.pi * angle).cos()


@dataclass(frozen=True)
class ExplorationNoise(Slot):
    """u <- u + sigma(t) rms n: n standard normal, rms the root mean square of u over a neuron, after NorMuon.

    sigma(t) = sigma min(1, t / ramp) (1 - t / end) at step t < end, then 0. It is computed in float32 or
    wider, and the sum is rounded to u's dtype once.
    """
    sigma: float
    ramp: int
    end: int

    each_matrix = False

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        return {KEY: ((*unit[:-2], 1, 2), torch.int64)}

    def numbers(self, plan: StepPlan, t: int) -> dict:
        rise = min(plan.step / self.ramp, 1.0) if self.ramp else 1.0
        return {"noise": self.sigma * rise * max(1 - plan.step / self.end, 0.0), "noise_step": plan.step}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        noise, t = step.numbers["noise"], step.numbers["noise_step"]
        if isinstance(noise, float) and not noise:
            return u
        t = t.to(torch.int64) if isinstance(t, torch.Tensor) else t
        wide = u.to(kept_dtype(u.dtype)).contiguous()
        drawn = normal(step.state[KEY], t, wide)
        none = wide.new_zeros(()).expand(len(u), *step.views.statistics_shape(tuple(u.shape[1:])))
        noisy = [
            x + noise * x.square().mean(axis, keepdim=True).sqrt() * n
            for (x, _, axis), (n, _, _) in zip(*(step.views.neurons(y, none) for y in (wide, drawn)))
        ]
        return (noisy[0].view(u.shape) if len(noisy) == 1 else step.views.join(noisy)).to(u.dtype)
