"""The products of an MLP in FP8, with delayed scales."""

import math

import torch
import torch.distributed as dist
from torch import nn

from kernels.fp8_mlp import LEAST, fp8_mlp
from layers.primitives import dtype
from settings import LOGICAL_RANKS


class FP8MLP(nn.Module):
    """The products of one MLP in FP8 (settings.FP8MLP), with the delayed scales of the second product.

    Buffers:
        activation: (logical ranks of this process,), ring buffer with one delayed scale per logical rank.
            A forward reads the scales of its ranks at the front and appends the new ones, so that after the
            forwards of a step the order is the same again, whatever the number of ranks per forward.
        weight: scale of c_proj, refreshed before the forwards of a step.
        following: value of `weight` after the next refresh.
        refreshes: number of refreshes so far.

    The first product has no state. Its weight scale is computed in each forward, which gives the same value
    all step long, because weights change only in the update.
    """

    def __init__(self, s):
        super().__init__()
        self.delayed = s.numerics.fp8_mlp.c_proj
        self.dtype, self.fused = dtype(s.numerics.matmul), s.system.kernels.mlp == "triton"
        if self.delayed is not None:
            ranks = LOGICAL_RANKS // (dist.get_world_size() if dist.is_initialized() else 1)
            self.register_buffer("activation", torch.ones(ranks), persistent=False)
            self.register_buffer("weight", torch.ones(()), persistent=False)
            self.register_buffer("following", torch.ones(()), persistent=False)
            self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x, c_fc, c_proj, tokens_per_rank=None):
        """x (R, T, D), of whole logical ranks or a part of one -> (R, T, D).

        tokens_per_rank: tokens of a logical rank; None: all of x is one rank.
        """
        rows = x.flatten(0, 1)
        parts = max(1, len(rows) // (tokens_per_rank or len(rows)))
        scales = None if self.delayed is None else (self.activation[:parts], self.weight)
        y, largest = fp8_mlp(rows, c_fc.to(x.dtype), c_proj.to(x.dtype), parts, scales, self.fused)
        if self.delayed is not None:
            new = largest.clamp(min=LEAST) * (self.delayed.activation / 448)
            self.activation.copy_(torch.cat([self.activation[parts:], new]))
        return y.view(x.shape)

    @torch.no_grad()
    def refresh(self, c_proj):
        """Refresh the scale of c_proj before the forwards of a step.

        Delayed scaling: the largest entry of the previous step; in the first steps, of the current weight.
        """
        if self.delayed is None:
            return
        largest = torch.linalg.vector_norm(c_proj, math.inf).to(self.dtype).clamp(min=LEAST)
        exact = (largest / 448).float()
        self.weight.copy_(torch.where(self.refreshes <= self.delayed.exact_steps, exact, self.following))
        self.following.copy_(largest.float() * (self.delayed.weight / 448))
        self.refreshes += 1

    def reset(self):
        if self.delayed is not None:
            for buffer in (self.activation, self.weight, self.following):
                buffer.fill_(1.0)
            self.refreshes.zero_()
