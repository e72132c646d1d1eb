"""Rotary positions, half rotation and YaRN."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from kernels import eager
from layers.primitives import dtype
from layers.specs import AttnSpec, LayerSpec, RotarySpec
from schedule import Windows
from settings import Settings


class Rotary(nn.Module):
    """Rotary positions: channel pairs (j, j + K/2) are rotated by -t f_j, where t is the index in the row.

    With model.attn.rope.adjacent the pairs are (2j, 2j + 1). The index is not reset at documents. Full
    (records 2 to 16): f_j = base^(-2j/K). Half-truncated (record 17 on): f_j = base^(-j/(K/4-1)) for the
    first K/4 pairs, and 0 for the others. With YaRN the tables depend on the long window (RotaryTables).
    """

    def __init__(self, s: Settings, spec: RotarySpec) -> None:
        super().__init__()
        n = s.numerics
        self.rope, self.width, self.turning, self.short = s.model.attn.rope, *spec
        self.table_dtype = dtype(n.rope)
        self.frequency_dtype = dtype(n.rope_frequency)
        self.math_dtype = dtype(n.rope_math)
        self.block = s.model.attn.window.block if s.model.attn.window else None
        # paired heads take two positions a token
        self.length = max(s.data.seq_len, s.validation.seq_len) * (2 if s.model.attn.paired_layers else 1)
        self.register_buffer(
            "cos", torch.empty(self.length, self.width // 2, dtype=self.table_dtype), persistent=False
        )
        self.register_buffer(
            "sin", torch.empty(self.length, self.width // 2, dtype=self.table_dtype), persistent=False
        )

    def frequencies(self, long_blocks: Sequence[int]) -> tuple[torch.Tensor, float]:
        """(f (K/2,), factor of the softmax scale) after the long window had these sizes, in blocks."""
        if self.short:
            long_blocks = [max(1, blocks // 2) for blocks in long_blocks]  # the short window (schedule.half)
        # float32 angles, as in the originals
        work = torch.float64 if self.table_dtype == torch.float64 else torch.float32
        if self.turning is not None:
            f = (1 / self.rope.base) ** torch.linspace(0, 1, self.turning, dtype=work)
            f = torch.cat([f, f.new_zeros(self.width // 2 - self.turning)])
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
        """Fill the tables for the long window's sizes so far. Returns the factor of the softmax scale."""
        f, factor = self.frequencies(long_blocks)
        # up to 262,144 positions, recomputed in timed steps: compute them on the device
        if self.cos.is_cuda:
            f = f.pin_memory().to(self.cos.device, non_blocking=True)
        angle = torch.outer(torch.arange(self.length, dtype=f.dtype, device=f.device), f)
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())
        return factor

    def forward(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """x: (R, T, H, K) at positions start..start+T-1 of its row. Returned in x's dtype."""
        cos = self.cos[start:start + x.size(1), None]
        sin = self.sin[start:start + x.size(1), None]
        return self.turned(x, cos, sin)

    def paired(self, x: torch.Tensor, start: int = 0) -> torch.Tensor:
        """x: (R, T, H, K) of paired heads: head h of token t is at position 2t + h mod 2 (record 58)."""
        places = slice(2 * start, 2 * (start + x.size(1)))
        cos, sin = (table[places].unflatten(0, (-1, 2)) for table in (self.cos, self.sin))  # (T, 2, K/2)
        halves = x.size(2) // 2
        cos, sin = (table.repeat(1, halves, 1) for table in (cos, sin))
        return self.turned(x, cos, sin)

    def turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x (R, T, H, K) rotated by tables (T, H or 1, K/2)."""
        wide = x.to(torch.promote_types(x.dtype, self.math_dtype))
        if (
            not self.rope.adjacent and eager.applies(wide)
            and torch.promote_types(wide.dtype, cos.dtype) == wide.dtype
        ):
            return eager.Rotate.apply(wide, cos, sin).to(x.dtype)
        if self.rope.adjacent:
            x1, x2 = wide.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).flatten(-2).to(x.dtype)
        x1, x2 = wide.chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


class RotaryTables:
    """The rotary tables of all widths and the softmax scale of every layer, for one size of the long window.

    Only YaRN (record 31) changes them: `update` recomputes them when the long window grows, and GPT.context
    refuses windows that they do not match. Sizes and factor are NumPy arrays, which a step reads without
    waiting for the GPU; tensors() returns tensors that share their memory.
    """

    def __init__(self, s: Settings, specs: Sequence[LayerSpec], rotaries: Sequence[Rotary]) -> None:
        self.specs, self.rotaries = specs, rotaries
        self.numbers = {(rotary.width, rotary.turning, rotary.short): i for i, rotary in enumerate(rotaries)}
        rope, window = s.model.attn.rope, s.model.attn.window
        self.yarn = rope is not None and rope.yarn is not None
        self.last = rope.yarn.last if self.yarn else None
        sizes = len(window.stages) + 1 if self.yarn and window is not None else 0
        # sizes of the long window so far in blocks, without the first one; 0: not reached yet
        self.reached = np.zeros(sizes, dtype=np.int64)
        self.factor = np.ones(max(1, len(rotaries)))  # YaRN's factor of the softmax scales, of each table
        self.scales = self.softmax_scales()

    def changes(self, windows: Windows | None) -> list[int]:
        """Sizes of the long window after the first one to which the tables of these windows adapt; [] without
        YaRN."""
        if windows is None or not self.yarn:
            return []
        return [blocks for blocks in windows.long_blocks[1:] if self.last is None or blocks <= self.last]

    def stands_at(self, windows: Windows | None) -> bool:
        """Whether the tables match these windows."""
        return [blocks for blocks in self.reached.tolist() if blocks] == self.changes(windows)

    def update(self, windows: Windows | None) -> None:
        """Recompute tables and softmax scales for these windows, unless they match already."""
        if not self.stands_at(windows):
            changes = self.changes(windows)
            self.fill((windows.long_blocks[0], *changes) if changes else ())
            self.reached[:] = 0
            self.reached[:len(changes)] = changes
        self.scales = self.softmax_scales()

    def fill(self, long_blocks: Sequence[int] = ()) -> None:
        """Fill the tables for these sizes of the long window so far."""
        for i, rotary in enumerate(self.rotaries):
            self.factor[i] = rotary.update_yarn(tuple(long_blocks))

    def reset(self) -> None:
        """Restore the tables of the first step."""
        self.reached[:] = 0
        self.fill()
        self.scales = self.softmax_scales()

    def softmax_scales(self) -> list[float | None]:
        """The softmax scale of every layer; None: 1 / sqrt(width of a query), or no attention."""
        if not self.reached.any():
            return [spec.attn and spec.attn.scale for spec in self.specs]
        return [spec.attn and self.scale_of(spec.attn) for spec in self.specs]

    def scale_of(self, attn: AttnSpec) -> float:
        """A layer's softmax scale with the factor of its table."""
        first = attn.scale if attn.scale is not None else 1 / math.sqrt(attn.qk)
        return self.factor.item(self.numbers[tuple(attn.rotary)]) * first

    def tensors(self) -> dict[str, torch.Tensor]:
        """{name: tensor} of what training changes: nothing without YaRN."""
        if not self.yarn:
            return {}
        tables = {f"{i}.{name}": table for i, rotary in enumerate(self.rotaries)
                  for name, table in rotary.named_buffers()}
        return {"reached": torch.from_numpy(self.reached), "factor": torch.from_numpy(self.factor), **tables}
