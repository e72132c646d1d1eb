"""Rotary positions, half rotation and YaRN."""

import math

import torch
from torch import nn

from layers.primitives import dtype
from settings import Settings


class Rotary(nn.Module):
    """Rotary positions: pairs (j, j + K/2) turned by -t f_j, t = index in the row (never reset at documents).

    full (records 2 to 16): f_j = base^(-2j/K). half (record 17 on): f_j = base^(-j/(K/4-1)) for the first K/4
    pairs, the others stand still. With yarn the tables follow the long window; `update_yarn` must be told its
    sizes.
    """

    def __init__(self, s: Settings, width: int):
        super().__init__()
        n = s.numerics
        self.rope, self.width = s.model.attn.rope, width
        self.table_dtype = dtype(n.rope)
        self.frequency_dtype = dtype(n.rope_frequency)
        self.math_dtype = dtype(n.rope_math)
        self.block = s.model.attn.window.block if s.model.attn.window else None
        self.length = max(s.data.seq_len, s.validation.seq_len)
        self.register_buffer(
            "cos", torch.empty(self.length, self.width // 2, dtype=self.table_dtype), persistent=False
        )
        self.register_buffer(
            "sin", torch.empty(self.length, self.width // 2, dtype=self.table_dtype), persistent=False
        )

    def frequencies(self, long_blocks):
        """(f (K/2,), factor of the attention scale) after the long window went through these sizes."""
        # as the originals: float32 angles
        work = torch.float64 if self.table_dtype == torch.float64 else torch.float32
        if self.rope.half_truncated:
            turning = self.width // 4
            f = (1 / self.rope.base) ** torch.linspace(0, 1, turning, dtype=work)
            f = torch.cat([f, f.new_zeros(self.width // 2 - turning)])
        else:
            f = 1 / self.rope.base ** (torch.arange(0, self.width, 2, dtype=work) / self.width)
        yarn, factor = self.rope.yarn, 1.0
        for a, b in zip(long_blocks, long_blocks[1:]) if yarn else ():
            turns = self.block * a * f / (2 * math.pi)
            keep = ((turns - yarn.alpha) / (yarn.beta - yarn.alpha)).clamp(0, 1)
            f = f * (a / b + keep * (1 - a / b))
            factor *= 1 + yarn.gain * math.log(b / a)
        return f.to(self.frequency_dtype).to(work), factor

    @torch.no_grad()
    def update_yarn(self, long_blocks: tuple[int, ...] = ()) -> float:
        """Fill the tables for the long window's sizes so far. Returns the factor of the attention scale."""
        f, factor = self.frequencies(long_blocks)
        # a quarter of a million positions: made where they are used, this is on the clock
        if self.cos.is_cuda:
            f = f.pin_memory().to(self.cos.device, non_blocking=True)
        angle = torch.outer(torch.arange(self.length, dtype=f.dtype, device=f.device), f)
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())
        return factor

    def forward(self, x, start=0):
        """x: (R, T, H, K) at positions start..start+T-1 of its row. Returned in x's dtype."""
        cos = self.cos[start:start + x.size(1), None]
        sin = self.sin[start:start + x.size(1), None]
        x1, x2 = x.to(torch.promote_types(x.dtype, self.math_dtype)).chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)
